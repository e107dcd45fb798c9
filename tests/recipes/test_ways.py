"""The ways to choose the tokens of stage 2, on scores that are made up."""

import numpy as np
import pytest

from study.row_run import RowRun
from study.rows import Row
from study.ways import NOISE_WAYS, WAYS, select_by
from vig import Score, Scores, select

MANIFEST = {"identity": {"measures": ["loss"]}, "complete": True, "text_only": [], "failures": {}}


def score(id: str, loss: np.ndarray, null_loss: np.ndarray) -> Score:
    vig = null_loss - loss
    numbers = {"vig": float(vig.mean()), "loss": float(loss.mean()), "null_loss": float(null_loss.mean())}
    ids, ends = np.arange(len(vig)), np.array([len(vig) - 1])
    return Score(id, **numbers, token_vig=vig, token_ids=ids, turn_ends=ends, digest="", token_loss=loss, null_token_loss=null_loss)


@pytest.mark.parametrize("way", sorted((WAYS | NOISE_WAYS).keys() - {"everything", "grounded"}))
def test_a_way_does_not_depend_on_the_order_of_the_scores(way):
    """Batches of another size, or a run that was stopped and went on, write the scores in another order."""
    rng = np.random.default_rng(0)
    made = [score(f"talk-{i}", *rng.exponential(size=(2, rng.integers(2, 9))).astype(np.float32)) for i in range(40)]
    chosen = []
    for scores in (Scores(made, MANIFEST), Scores([made[place] for place in rng.permutation(40)], MANIFEST)):
        masks = select_by(way, scores, 0.5, seed=3).token_masks
        chosen.append({id: masks[id].tolist() for id in masks})
    assert chosen[0] and chosen[0] == chosen[1]


@pytest.mark.parametrize(("middle", "way"), [(0.1, "random-samples"), (-0.1, "random")])
def test_a_row_takes_whole_samples_where_the_rule_leaves_out_what_the_image_helped(middle, way):
    """In each sample a word has a large VIG, and all other tokens a small VIG of the same sign."""
    loss = np.ones(5, np.float32)
    made = [score(f"talk-{i}", loss, loss + np.array([2, *[middle] * 4], np.float32) * (i + 1) / 40) for i in range(40)]
    row = Row("interleaved+random", ("clip",), "interleaved", selection="random", heeds=True)
    assert RowRun(row, setting=None, records=None, folder=None, seed=0).heeded(select(Scores(made, MANIFEST), 0.7)) == way
