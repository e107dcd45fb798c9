"""The ways to choose the tokens of stage 2, on scores that are made up."""

import numpy as np
import pytest

from study.ways import NOISE_WAYS, WAYS, select_by
from vig import Score, Scores

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
