import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mof.data.digests import digest
from vig import Score, Scores, random_selection, record_sources, select

VALUES = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 0.3, 1.0, 1.1, 4.0])  # few, so that ties are common
TOKENS = st.lists(st.lists(VALUES | st.floats(-5, 5, width=32), min_size=1, max_size=6), min_size=1, max_size=12)
KEEP = st.sampled_from([Fraction(k, 20) for k in range(21)])


def record_of(index: int) -> dict[str, str]:
    return {"id": f"s{index}", "image": f"{index}.png"}


def make_scores(tokens: list[list[float]], ends: bool = True, failures: dict[str, str] | None = None) -> Scores:
    items = []
    for index, values in enumerate(tokens):
        token_vig = np.array(values, dtype=np.float32)
        vig = float(np.float32(token_vig.mean(dtype=np.float64))) if values else math.nan
        turn_ends = np.array([len(values) - 1] if ends else [], dtype=np.int64)
        ids = np.arange(len(values), dtype=np.int64)
        items.append(Score(f"s{index}", vig, 1.0, 1.0 + vig, token_vig, ids, turn_ends, digest(record_of(index))))
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


@pytest.mark.parametrize("level", ["both", "samples", "tokens"])
def test_random_control_does_not_depend_on_the_order_of_the_scores(level) -> None:
    """Batches of another size, or a run that was stopped and went on, write the scores in another order."""
    rng = np.random.default_rng(0)
    scores = make_scores([rng.normal(size=rng.integers(1, 9)).tolist() for _ in range(40)])
    other = Scores([scores[place] for place in rng.permutation(40)], scores.manifest)
    masks = []
    for order in (scores, other):
        drawn = random_selection(order, select(order, 0.5), 3, level).token_masks
        masks.append({id: drawn[id].tolist() for id in drawn})
    assert other.ids != scores.ids and masks[0] == masks[1]


def test_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        select(make_scores([]))
    with pytest.raises(ValueError, match="'s1'"):
        select(make_scores([[0.0], [1.0, math.nan]]))
    with pytest.raises(ValueError, match="'s1'"):
        select(make_scores([[0.0], []]))  # the mean of no tokens
    scores = make_scores([[0.0], [1.0]])
    for share in (-0.1, 1.5, 70, math.nan):
        with pytest.raises(ValueError, match="^keep"):
            select(scores, share)
        with pytest.raises(ValueError, match="^token_keep"):
            select(scores, token_keep=share)
        for quota in (share, {"(none)": share}):
            with pytest.raises(ValueError, match=r"'\(none\)'"):
                select(scores, quota=quota)
    for threshold in (math.nan, math.inf, "none"):
        with pytest.raises(ValueError, match=f"token_threshold.* {threshold!r}"):
            select(scores, token_threshold=threshold)
    for threshold in (math.nan, math.inf):
        with pytest.raises(ValueError, match="^threshold"):
            select(scores, threshold=threshold)
    with pytest.raises(ValueError, match="'ocr'.* a, b"):
        select(scores, sources={"s0": "a", "s1": "b"}, quota={"ocr": 0.5})
    with pytest.raises(ValueError, match="like"):
        random_selection(make_scores([[0.0]]), select(scores))
    with pytest.raises(ValueError, match="'sample'"):
        random_selection(scores, select(scores), level="sample")
    for low, high in ((0, 1), (2, 1), (-1, 1), (1, math.inf), (math.nan, 1)):
        with pytest.raises(ValueError, match=f"got {low} and {high}"):
            select(scores).weighted(low, high)


def test_a_score_without_tokens_is_no_trouble() -> None:
    """The scorer lists such records as failures; by hand one can have a VIG."""
    scores = make_scores([[1.0], [2.0, 0.0]])
    empty = Score("empty", 0.5, 1.0, 1.5, np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64), "0")
    both, alone = (Scores(items, scores.manifest) for items in ([*scores, empty], [empty]))
    for options in ({}, {"token_threshold": None}, {"token_keep": 0.5}):
        selection = select(both, 1, **options)
        assert selection.sample_ids == ["s0", "s1", "empty"] and selection.token_masks["empty"].tolist() == []
        assert selection.weighted(0.5, 2).token_weights["empty"].tolist() == []
        nothing = select(alone, 1, **options)
        assert nothing.summary().sparsity == 0 and nothing.weighted(0.5, 2).token_weights["empty"].tolist() == []
        for level in ("both", "samples", "tokens"):
            assert random_selection(both, selection, level=level).summary().tokens_kept == selection.summary().tokens_kept
            assert random_selection(alone, nothing, level=level).summary().tokens_kept == 0


@given(TOKENS, st.floats(-5, 5), st.none() | st.floats(-5, 5))
def test_thresholds_in_nats(tokens, threshold, token_threshold) -> None:
    scores = make_scores(tokens)
    selection = select(scores, threshold=threshold, token_threshold=token_threshold, keep_end_of_turn=False)
    assert selection.sample_ids == [s.id for s in scores if s.vig >= np.float32(threshold)]
    for s in scores:
        expected = [token_threshold is None or v >= np.float32(token_threshold) for v in s.token_vig.tolist()]
        assert s.id not in selection.token_masks or selection.token_masks[s.id].tolist() == expected


@given(TOKENS, KEEP, KEEP)
def test_token_quantile_is_that_of_the_kept_samples(tokens, keep, token_keep) -> None:
    scores = make_scores(tokens)
    selection = select(scores, float(keep), token_keep=float(token_keep), keep_end_of_turn=False)
    values = sorted((v for s in scores if s.id in selection.token_masks for v in s.token_vig.tolist()), reverse=True)
    wanted = math.ceil(token_keep * len(values))
    expected = sum(v >= values[wanted - 1] for v in values) if wanted else 0  # with ties
    assert selection.summary().tokens_kept == expected >= wanted
    for s in scores:
        if s.id in selection.token_masks and wanted:
            assert selection.token_masks[s.id].tolist() == [v >= values[wanted - 1] for v in s.token_vig.tolist()]


NAMES = st.lists(st.sampled_from(["coco", "ocr", "gqa"]), min_size=12, max_size=12)


def brute_force_quotas(scores, keep, sources, quotas):
    """One by one: every source's best until its quota, then the best of the rest until the total; ties always."""
    chosen = set()
    for source, quota in quotas.items():
        own = sorted((s for s in scores if sources[s.id] == source), key=lambda s: -s.vig)
        seats = math.ceil(quota * len(own))
        chosen |= {s.id for s in own if seats and s.vig >= own[seats - 1].vig}
    rest = sorted((s for s in scores if s.id not in chosen), key=lambda s: -s.vig)
    seats = max(math.ceil(keep * len(scores)) - len(chosen), 0)
    return chosen | {s.id for s in rest if seats and s.vig >= rest[seats - 1].vig}


@given(TOKENS, NAMES, KEEP, st.dictionaries(st.sampled_from(["coco", "ocr", "gqa"]), KEEP) | KEEP)
def test_quotas(tokens, names, keep, quota) -> None:
    scores = make_scores(tokens)
    sources = dict(zip(scores.ids, names, strict=False))
    present = set(sources.values())
    quotas = {k: v for k, v in quota.items() if k in present} if isinstance(quota, dict) else dict.fromkeys(present, quota)
    given_quota = {k: float(v) for k, v in quotas.items()} if isinstance(quota, dict) else float(quota)
    selection = select(scores, float(keep), sources=sources, quota=given_quota)
    assert set(selection.sample_ids) == brute_force_quotas(scores, keep, sources, quotas)
    summary = selection.summary()
    assert set(summary.sources) == present
    for name in ("samples_kept", "samples_total", "tokens_kept", "tokens_total"):
        assert sum(getattr(counts, name) for counts in summary.sources.values()) == getattr(summary, name)
    for source, share in quotas.items():
        counts = summary.sources[source]
        assert counts.samples_kept >= share * counts.samples_total
    for s in scores:  # the threshold of a source is that of its last sample, for its tokens too
        if s.id in selection.token_masks:
            kept = [t.vig for t in scores if t.id in selection.token_masks and sources[t.id] == sources[s.id]]
            assert all(selection.token_masks[s.id] | (s.token_vig < min(kept)))
            assert selection.token_masks[s.id].any()


def test_quota_saves_a_rare_source() -> None:
    scores = make_scores([[3.0 + i / 10] for i in range(8)] + [[-2.0], [-1.0]])
    sources = {s.id: "ocr" if s.vig < 0 else "coco" for s in scores}
    assert select(scores, 0.5, sources=sources).summary().sources["ocr"].samples_kept == 0
    saved = select(scores, 0.5, sources=sources, quota={"ocr": 0.5})
    assert saved.sample_ids == ["s4", "s5", "s6", "s7", "s9"]
    assert saved.threshold == pytest.approx(3.4)
    lines = str(saved.summary()).splitlines()
    assert [line.split()[:6] for line in lines[1:]] == [["coco", "4", "of", "8", "samples", "4"], ["ocr", "1", "of", "2", "samples", "1"]]
    assert lines[2].endswith("sparsity  50.0%") and "5 of 10 samples" in lines[0]
    assert "with VIG >= -1.0000 to 3.4000 nats (by source), " in lines[0]  # a threshold of all would not be true
    assert "with VIG >= 3.3000 nats, " in str(select(scores, 0.5).summary())
    measured = select(scores, 0.5, by="vppo").summary()
    assert f"with vppo >= {measured.threshold:.4f}, " in str(measured)  # it has no unit


def test_a_token_threshold_above_0_is_said_to_drop_helped_tokens() -> None:
    """In the study of noise, selections by such a threshold lost up to 44 points of pairs."""
    scores = make_scores([[0.1, 0.1, 0.1, 3.0, 0.0], [0.2, -0.1, 0.2, 2.0, 0.0], [-1.0, -1.0, 0.5, -1.0, 0.0]])
    shared = select(scores, 0.6).summary()
    assert shared.threshold > 0 and shared.helped_left_out == pytest.approx(5 / 7)
    assert "71% of the kept samples' tokens that the image helped get no loss" in str(shared) and "--token-threshold none" in str(shared)
    others = select(scores, 0.6, token_threshold=None), select(scores, floor=True), select(scores, 1)
    for selection in (*others, random_selection(scores, select(scores, 0.6))):
        assert selection.summary().helped_left_out == 0 and "helped" not in str(selection.summary())


def test_samples_kept_for_words_that_the_model_cannot_predict_are_said() -> None:
    """Two fifths of the answers are in a language that the model never saw: their losses are large, and so is their VIG by accident."""
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(0.06, 0.05, (60, 5)), rng.normal(0.5, 0.6, (40, 5))
    scores = make_scores([*known.tolist(), *unknown.tolist()])
    losses = [0.08] * 60 + [12.0] * 40
    strange = Scores(
        [replace(score, loss=loss, null_loss=loss + score.vig) for score, loss in zip(scores, losses, strict=True)], scores.manifest
    )
    rise = [math.exp(-score.loss) - math.exp(-score.null_loss) for score in strange]
    most = {strange.ids[place] for place in np.argsort(rise)[-70:]}
    warned, calm = select(strange, 0.7, token_threshold=None).summary(), select(scores, 0.7, token_threshold=None).summary()
    assert warned.by_accident == pytest.approx(len(set(select(strange, 0.7).sample_ids) - most) / 70) and warned.by_accident > 0.1
    assert f"{warned.by_accident:.0%} of the kept samples hold words" in str(warned) and "--by gain" in str(warned)
    assert calm.by_accident == 0 and "accident" not in str(calm)
    vig = rng.lognormal(-2, 0.7, (100, 5))  # the top half by VIG is not the top half by the rise of probability, but words are predictable
    ordinary = make_scores(vig.tolist())
    losses = rng.uniform(0.3, 2.5, 100)
    likely = [replace(score, loss=loss, null_loss=loss + score.vig) for score, loss in zip(ordinary, losses, strict=True)]
    assert select(Scores(likely, ordinary.manifest), 0.5).summary().by_accident == 0
    for selection in (select(strange, floor=True), random_selection(strange, select(strange, 0.7))):
        assert selection.summary().by_accident == 0
    both = str(replace(warned, helped_left_out=0.5))  # two warnings name one command
    assert "hold words" in both and "--floor" in both and "--by gain" not in both


def test_the_warning_of_unlikely_words_is_for_every_measure_and_with_sources() -> None:
    rng = np.random.default_rng(0)
    scores = make_scores([*rng.normal(0.06, 0.05, (60, 5)).tolist(), *rng.normal(0.5, 0.6, (40, 5)).tolist()])
    losses = [0.08] * 60 + [12.0] * 40
    items = [replace(score, loss=loss, null_loss=loss + score.vig) for score, loss in zip(scores, losses, strict=True)]
    strange = Scores(items, {**scores.manifest, "identity": {"null": {"name": "drop"}}})
    expected = select(strange, 0.7).summary().by_accident
    assert expected > 0.1
    visnec = select(strange, 0.7, by="visnec").summary()  # the same records
    assert visnec.by_accident == expected and "so visnec is large by accident" in str(visnec)
    half = {score.id: "ab"[place % 2] for place, score in enumerate(strange)}
    assert select(strange, 0.7, sources=half).summary().by_accident == expected
    unlike = {score.id: "known" if place < 60 else "unknown" for place, score in enumerate(strange)}
    assert select(strange, 0.7, sources=unlike).summary().by_accident == expected
    by_quota = select(strange, 0.7, sources=unlike, quota=0.7)  # in each source, the image made the kept samples most probable
    kept = [sum(by_quota.token_masks.chosen[side]) for side in (slice(60), slice(60, None))]
    assert kept == [42, 28] and by_quota.summary().by_accident < 0.05


@given(TOKENS, KEEP, st.sampled_from(["shared", None, 0.3]), st.integers(0, 5))
def test_random_samples_and_random_tokens_have_equal_tokens(tokens, keep, token_threshold, seed) -> None:
    scores = make_scores(tokens)
    like = select(scores, float(keep), token_threshold=token_threshold)
    budget = like.summary().tokens_kept
    samples = random_selection(scores, like, seed, "samples")
    parts = [mask for mask in samples.token_masks.values() if not mask.all()]
    assert samples.summary().tokens_kept == budget and len(parts) <= 1  # whole ones, and one cut
    assert all(mask.any() for mask in samples.token_masks.values())
    assert all(part[-1] for part in parts)  # its end of turn first
    spread = random_selection(scores, like, seed, "tokens")
    assert spread.summary().tokens_kept == budget and spread.sample_ids == scores.ids
    ends = sum(bool(mask[-1]) for mask in spread.token_masks.values())
    assert ends == min(budget, len(scores))


@given(TOKENS, KEEP, st.booleans(), st.sampled_from([(0.1, 2.0), (0.5, 0.5), (1e-3, 100.0)]))
def test_token_weights(tokens, keep, keep_ends, clamp) -> None:
    scores = make_scores(tokens)
    hard = select(scores, float(keep), keep_end_of_turn=keep_ends)
    soft = hard.weighted(*clamp)
    raw = {s.id: [min(max(v, clamp[0]), clamp[1]) for v in s.token_vig.tolist()] for s in scores}
    inner = [raw[id][t] for id, mask in hard.token_masks.items() for t in range(len(mask) - 1) if mask[t]]
    for id, mask in hard.token_masks.items():
        weights = soft.token_weights[id]
        assert ((weights > 0) == mask).all() and np.array_equal(soft.token_masks[id], mask)
        assert weights[-1] == mask[-1]  # the end of turn: 1, or nothing
        for t in range(len(mask) - 1):
            assert not mask[t] or weights[t] == pytest.approx(raw[id][t] / np.mean(inner), rel=1e-5)
    if inner:
        assert np.mean([w for id in hard.token_masks for w in soft.token_weights[id][:-1] if w]) == pytest.approx(1, rel=1e-4)
    records = [record_of(index) for index in range(len(scores))]
    applied = soft.apply(records)
    assert [record["id"] for record in applied] == hard.sample_ids and all("token_mask" not in record for record in applied)
    assert all(record["token_weights"] == soft.token_weights[record["id"]].tolist() for record in applied)


def test_sources_of_records() -> None:
    records = [
        {"id": "a", "image": "ocr_vqa/images/1.jpg", "source": "OCR"},
        {"id": "b", "images": ["coco/2.jpg", "gqa/3.jpg"], "source": 7},
        {"id": "c", "image": "4.jpg", "source": None},
        {"id": "d"},
        {"id": "e", "image": ""},
        {"id": "f", "images": []},
        {"id": "g", "image": 5},
        "no record",
    ]
    by_folder, by_key = record_sources(records, "image"), record_sources(records)
    assert list(by_folder.values()) == ["ocr_vqa", "coco", *["(none)"] * 6]
    assert list(by_key.values()) == ["OCR", "7", *["(none)"] * 6]
    assert list(by_key)[:7] == list("abcdefg")


def test_sources_of_absolute_paths_and_of_images_inside_of_messages() -> None:
    def inside(path: str) -> list[dict]:
        return [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": path}]}]

    records = [
        {"id": "a", "image": "/data/sets/coco/train/1.jpg"},
        {"id": "b", "conversations": None, "messages": inside("/data/sets/gqa/1.jpg")},
        {"id": "c", "images": [{"bytes": None, "path": "/data/sets/coco/2.jpg"}]},
        {"id": "d", "messages": inside("ocr_vqa/1.jpg")},
    ]
    assert list(record_sources(records, "image").values()) == ["coco", "gqa", "coco", "ocr_vqa"]
    assert record_sources(records[:1], "image") == {"a": "train"}  # of what all share, the last folder


TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


def test_apply(caplog) -> None:
    scores = make_scores([[3.0, 0.0, -1.0], [-1.0, -1.0], [2.0, 5.0]], failures={"bad": "broken"})
    scores.manifest["text_only"] = ["text"]
    selection = select(scores, 2 / 3)
    assert selection.threshold == pytest.approx(2 / 3)
    part = {"type": "image", "image": "x.png"}
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}]
    records = [
        record_of(1),
        {"id": "text", "conversations": TURNS},
        record_of(0),
        {"id": "bad", "image": "bad.png"},
        {"id": "text chat", "messages": chat},
        record_of(2),
    ]
    left_out = [
        {"id": "new", "image": "new.png", "conversations": [{"from": "human", "value": "<image>"}, TURNS[1]]},
        {"id": "new chat", "messages": [{"role": "user", "content": [part]}, chat[1]]},
        {"id": "no answer", "conversations": TURNS[:1]},
        {"id": "no turns"},
        {"id": "odd", "messages": {"role": "user"}},
        {"id": "odder", "messages": [None, "Hi", {"role": "user", "content": 3}]},
        {"id": "oddest", "messages": [{"role": "user", "content": [None, 3, {"type": ["image"]}]}]},
        {"id": "wrong role", "conversations": [{"from": "robot", "value": "Hi"}, TURNS[1]]},
        "not a dict",
        None,
    ]
    applied = selection.apply([*records, *left_out])
    assert applied == [
        {"id": "text", "conversations": TURNS},
        {"id": "s0", "image": "0.png", "token_mask": [True, False, True], "scored_digest": digest(record_of(0))},
        {"id": "text chat", "messages": chat},
        {"id": "s2", "image": "2.png", "token_mask": [True, True], "scored_digest": digest(record_of(2))},
    ]
    assert "token_mask" not in records[2]
    assert f"{len(left_out)} records have no score" in caplog.text
    assert "1 text-only kept whole; 1 failed left out" in str(selection.summary())


def test_other_records_are_refused() -> None:
    selection = select(make_scores([[3.0, 0.0], [-1.0, -1.0]]), 0.5)
    records = [record_of(0), record_of(1)]
    for changed in (records[0] | {"image": "1.png"}, records[0] | {"conversations": TURNS}, {"id": "s0"}):
        with pytest.raises(ValueError, match="'s0' is not what was scored"):
            selection.apply([changed, records[1]])
    with pytest.raises(ValueError, match="'s1' is not what was scored.* equal ids are numbered"):  # though it was not chosen
        selection.apply([records[0], record_of(1) | {"image": "x.png"}])
    for others in ([], [{"id": "x", "conversations": TURNS}], [{"id": "x", "image": "x.png"}], ["nothing"]):
        with pytest.raises(ValueError, match="met none of these records"):
            selection.apply(others)


def test_a_selection_of_selected_records() -> None:
    """Records that were selected, scored again and selected again: the new mask, and the digest of the record itself."""
    selected = record_of(0) | {"token_mask": [True], "scored_digest": digest(record_of(0))}
    item = Score("s0", 1.0, 1.0, 2.0, np.ones(2, np.float32), np.arange(2), np.array([1]), digest(selected))
    again = select(Scores([item], {"identity": {}, "complete": True, "text_only": [], "failures": {}}), 1).apply([selected])
    assert again == [record_of(0) | {"token_mask": [True, True], "scored_digest": digest(record_of(0))}]


@pytest.mark.parametrize(
    "more", [{"source": "ocr"}, {"a": 1, "b": None, "c": [2]}, {"token_mask": [True, True]}, dict.fromkeys("abcdefghijkl")]
)
def test_entries_may_be_added_after_scoring(more) -> None:
    """The digest in the selected record is that of the record with its new entries."""
    scores = make_scores([[3.0, 0.0]])
    [chosen] = select(scores, 1).apply([record_of(0) | more])
    own = record_of(0) | {key: value for key, value in more.items() if key != "token_mask"}
    assert chosen == own | {"token_mask": [True, True], "scored_digest": digest(own)}
    with pytest.raises(ValueError, match="'s0'"):
        select(scores, 1).apply([record_of(0) | more | {"image": "other.png"}])
