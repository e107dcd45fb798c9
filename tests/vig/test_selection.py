import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vig import Score, Scores, random_selection, select

VALUES = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 0.3, 1.0, 1.1, 4.0])  # few, so that ties are common
TOKENS = st.lists(st.lists(VALUES | st.floats(-5, 5, width=32), min_size=1, max_size=6), min_size=1, max_size=12)
KEEP = st.sampled_from([Fraction(k, 20) for k in range(21)])


def make_scores(tokens: list[list[float]], ends: bool = True, failures: dict[str, str] | None = None) -> Scores:
    items = []
    for index, values in enumerate(tokens):
        token_vig = np.array(values, dtype=np.float32)
        vig = float(np.float32(token_vig.mean(dtype=np.float64)))
        turn_ends = np.array([len(values) - 1] if ends else [], dtype=np.int64)
        ids = np.arange(len(values), dtype=np.int64)
        items.append(Score(f"s{index}", vig, 1.0, 1.0 + vig, token_vig, ids, turn_ends, "0"))
    return Scores(items, {"identity": {}, "complete": True, "text_only": [], "failures": failures or {}})


@given(TOKENS, KEEP)
def test_samples_are_the_top_share_with_ties(tokens, keep) -> None:
    scores = make_scores(tokens)
    chosen = set(select(scores, float(keep)).sample_ids)
    wanted = math.ceil(keep * len(scores))  # exact arithmetic
    ranked = sorted(scores, key=lambda s: -s.vig)
    expected = {s.id for s in scores if wanted and s.vig >= ranked[wanted - 1].vig}
    assert chosen == expected
    assert len(chosen) >= wanted


@given(TOKENS, KEEP, st.booleans(), st.sampled_from(["shared", None, -1.0, 0.3]))
def test_tokens_and_sparsity(tokens, keep, keep_ends, token_threshold) -> None:
    scores = make_scores(tokens)
    selection = select(scores, float(keep), token_threshold=token_threshold, keep_end_of_turn=keep_ends)
    floor = {"shared": selection.threshold, None: -math.inf}.get(token_threshold, token_threshold)
    kept = 0
    for s in scores:
        if s.id not in selection.token_masks:
            assert s.vig < selection.threshold
            continue
        last = len(s.token_vig) - 1
        expected = [bool(v >= np.float32(floor)) or (keep_ends and t == last) for t, v in enumerate(s.token_vig)]
        assert selection.token_masks[s.id].tolist() == expected
        if token_threshold == "shared":
            assert any(expected)  # the mean reaches tau, so some token does
        kept += sum(expected)
    summary = selection.summary()
    total = sum(map(len, tokens))
    assert (summary.tokens_kept, summary.tokens_total) == (kept, total)
    assert (summary.samples_kept, summary.samples_total) == (len(selection.sample_ids), len(tokens))
    assert summary.sparsity == pytest.approx((total - kept) / total)
    assert f"{kept} of {total} answer tokens" in str(summary)


@given(TOKENS)
def test_keep_none_and_keep_all(tokens) -> None:
    scores = make_scores(tokens)
    nothing = select(scores, 0)
    assert nothing.sample_ids == [] and nothing.summary().sparsity == 1
    everything = select(scores, 1, token_threshold=None, keep_end_of_turn=False)
    assert everything.sample_ids == scores.ids and everything.summary().sparsity == 0


@given(st.integers(1, 9), VALUES | st.floats(-5, 5, width=32), KEEP.filter(bool))
def test_all_equal_keeps_all(count, value, keep) -> None:
    selection = select(make_scores([[value] * 3] * count), float(keep))
    assert selection.summary().tokens_kept == 3 * count


@given(TOKENS, KEEP, st.sampled_from(["shared", None, 0.3]), st.booleans(), st.integers(0, 5))
def test_random_control_has_equal_samples_and_tokens(tokens, keep, token_threshold, keep_ends, seed) -> None:
    scores = make_scores(tokens)
    like = select(scores, float(keep), token_threshold=token_threshold, keep_end_of_turn=keep_ends)
    control = random_selection(scores, like, seed)
    assert len(control.sample_ids) == len(like.sample_ids)
    assert control.summary().tokens_kept == like.summary().tokens_kept
    assert control.threshold is None and "at random" in str(control.summary())
    by_id = {s.id: s for s in scores}
    assert all(len(mask) == len(by_id[id].token_vig) for id, mask in control.token_masks.items())
    again = random_selection(scores, like, seed)
    assert {id: mask.tolist() for id, mask in again.token_masks.items()} == {id: mask.tolist() for id, mask in control.token_masks.items()}
    if keep_ends:  # then the budget has a token for the end of every turn
        assert all(mask[-1] for mask in control.token_masks.values())


def test_random_control_is_random() -> None:
    scores = make_scores(np.random.default_rng(0).normal(size=(40, 10)).tolist())
    like = select(scores, 0.5)
    controls = [random_selection(scores, like, seed) for seed in range(3)]
    assert len({tuple(control.sample_ids) for control in controls}) == 3
    assert controls[0].sample_ids == sorted(controls[0].sample_ids, key=scores.ids.index)  # in the order of the scores
    middle = np.mean([mask[:-1].mean() for control in controls for mask in control.token_masks.values()])
    expected = (like.summary().tokens_kept - 20) / (20 * 9)  # what is left after the 20 ends of turn
    assert middle == pytest.approx(expected)


def test_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        select(make_scores([]))
    with pytest.raises(ValueError, match="not finite.*'s1'"):
        select(make_scores([[0.0], [1.0, math.nan]]))
    for keep in (-0.1, 1.5, 70, math.nan):
        with pytest.raises(ValueError, match="keep is the share"):
            select(make_scores([[0.0]]), keep)
    for threshold in (math.nan, math.inf):
        with pytest.raises(ValueError, match="token_threshold"):
            select(make_scores([[0.0]]), token_threshold=threshold)
    with pytest.raises(ValueError, match="other scores"):
        random_selection(make_scores([[0.0]]), select(make_scores([[0.0], [1.0]])))


def test_apply() -> None:
    scores = make_scores([[3.0, 0.0, -1.0], [-1.0, -1.0], [2.0, 5.0]], failures={"bad": "broken"})
    selection = select(scores, 2 / 3)
    assert selection.threshold == pytest.approx(2 / 3)
    part = {"type": "image", "image": "x.png"}
    records = [
        {"id": "s1", "image": "1.png"},
        {"id": "text"},
        {"id": "s0", "image": "0.png"},
        {"id": "bad", "image": "bad.png"},
        {"id": "new", "image": "new.png"},
        {"id": "new chat", "messages": [{"role": "user", "content": [part]}]},
        {"id": "text chat", "messages": [{"role": "user", "content": "Hi"}]},
        {"id": "s2", "images": ["2.png"]},
    ]
    assert selection.apply(records) == [
        {"id": "text"},
        {"id": "s0", "image": "0.png", "token_mask": [True, False, True]},
        {"id": "text chat", "messages": [{"role": "user", "content": "Hi"}]},
        {"id": "s2", "images": ["2.png"], "token_mask": [True, True]},
    ]
    assert "token_mask" not in records[2]
    assert "1 failed" in str(selection.summary())
