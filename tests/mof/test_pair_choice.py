"""The choice among pairs, against the rules written down: best first, pair by pair, over all pairs at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spectra import embeddings

from encoders import progress
from mof import blind_pairs
from mof.pairs import choice as pair_choice
from mof.pairs import comparison as pair_comparison
from mof.pairs.choice import PAIR, BestPairs, leaders
from mof.pairs.embedding_rows import EmbeddingRows


def collection(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings of things in several views, each view in several copies that differ a little."""
    rng = np.random.default_rng(seed)
    things, views = rng.integers(4, size=count), rng.integers(12, size=count)
    clip = rng.normal(size=(4, 24))[things] + 0.1 * rng.normal(size=(12, 24))[views] + 0.01 * rng.normal(size=(count, 24))
    dino = rng.normal(size=(12, 16))[views] + 0.01 * rng.normal(size=(count, 16))
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (clip, dino))


def lead(images: list[int], same: np.ndarray) -> dict[int, int]:
    """Return each image's leader: the first image that leads itself and is the same; `same` is a matrix of yes and no."""
    leader: dict[int, int] = {}
    for b in images:
        leader[b] = next((a for a in leader if leader[a] == a and same[a, b]), b)
    return leader


def by_the_rules(pairs, clip, dino, above, max_pairs, one_per_image, duplicates_above, per_cluster) -> list[tuple[int, int]]:
    order = sorted(zip((-pairs.gap).tolist(), pairs.i.tolist(), pairs.j.tolist(), strict=True))
    images = list(dict.fromkeys(image for _, i, j in order for image in (i, j)))
    a, b = clip @ clip.T, dino @ dino.T
    same = lead(images, (a > (2 if duplicates_above is None else duplicates_above)) & (b > (duplicates_above or 0)))
    cluster = lead(images, a > above)
    kept: list[tuple[int, int]] = []
    used, shown, clusters = set(), set(), []
    for _, i, j in order:
        pair = frozenset((same[i], same[j]))
        blocked = len(pair) == 1 or pair in shown or (one_per_image and pair & used)
        if blocked or (per_cluster and clusters.count(cluster[i]) >= per_cluster) or len(kept) == max_pairs:
            continue
        kept.append((i, j))
        used |= pair
        shown.add(pair)
        clusters.append(cluster[i])
    return kept


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    max_pairs=st.sampled_from([None, 0, 1, 5, 1000]),
    one_per_image=st.booleans(),
    duplicates_above=st.sampled_from([None, 0.99]),
    per_cluster=st.sampled_from([None, 1, 3]),
    window=st.sampled_from([7, 100, 4_000_000]),
)
def test_what_is_kept_follows_the_rules(seed, max_pairs, one_per_image, duplicates_above, per_cluster, window):
    clip, dino = collection(seed)
    everything = blind_pairs(clip, dino, 0.9, 0.6)
    rules = {"max_pairs": max_pairs, "one_per_image": one_per_image, "duplicates_above": duplicates_above, "per_cluster": per_cluster}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_choice, "WINDOW", window)
        kept = blind_pairs(clip, dino, 0.9, 0.6, **rules)
    assert list(zip(kept.i.tolist(), kept.j.tolist(), strict=True)) == by_the_rules(everything, clip, dino, 0.9, **rules)
    assert kept.total == len(everything)


def test_each_rule_leaves_something_out():
    clip, dino = collection(0)
    everything = blind_pairs(clip, dino, 0.9, 0.6)
    assert len(everything) > 100
    one = blind_pairs(clip, dino, 0.9, 0.6, one_per_image=True)
    assert len(np.unique([one.i, one.j])) == 2 * len(one) < 60
    assert 1 < len(blind_pairs(clip, dino, 0.9, 0.6, per_cluster=1)) <= 4
    apart = blind_pairs(clip, dino, 0.9, 0.6, duplicates_above=0.99)
    assert 4 < len(apart) < len(everything) / 2
    assert apart.gap[0] == everything.gap[0]
    assert "kept; gap" in apart.summary()


def test_duplicates_by_embeddings_of_another_kind():
    clip, dino = collection(0)
    looks = np.repeat(np.eye(20), 3, axis=0)  # three images in a row look the same
    kept = blind_pairs(clip, dino, 0.9, 0.6, duplicates_above=0.9, duplicates_by=looks)
    groups = [tuple(sorted((i // 3, j // 3))) for i, j in zip(kept.i.tolist(), kept.j.tolist(), strict=True)]
    everything = blind_pairs(clip, dino, 0.9, 0.6)
    assert len(set(groups)) == len(groups)
    assert set(groups) == {tuple(sorted((i // 3, j // 3))) for i, j in zip(everything.i, everything.j, strict=True) if i // 3 != j // 3}
    assert any(i // 3 == j // 3 for i, j in zip(everything.i, everything.j, strict=True))


def test_counting_only():
    clip, dino = collection(1)
    counted = blind_pairs(clip, dino, 0.9, 0.6, max_pairs=0)
    assert len(counted) == 0
    assert counted.total == len(blind_pairs(clip, dino, 0.9, 0.6)) > 0
    assert counted.summary() == f"{counted.total:,} blind pairs among 60 images (1,770 pairs); 0 kept"


@given(
    gaps=st.lists(st.integers(0, 5), max_size=300),
    most=st.integers(0, 20),
    parts=st.integers(1, 10),
    mark=st.integers(0, 300),
)
def test_the_best_are_held_exactly_in_bounded_memory(gaps, most, parts, mark):
    pairs = np.zeros(len(gaps), PAIR)
    pairs["clip"], pairs["j"] = gaps, np.arange(len(gaps)) % 7
    pairs["i"] = np.random.default_rng(0).permutation(len(gaps))
    ranked = sorted(pairs.tolist(), key=lambda pair: (-pair[2], pair[0], pair[1]))
    after = np.array(ranked[mark : mark + 1], PAIR) if mark < len(ranked) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_choice, "SPARE", 3)
        best = BestPairs(most, after=after)
        for part in np.array_split(pairs, parts):
            best.add(part, len(part))
            assert sum(map(len, best._held)) <= 2 * most + 3
    assert best.ranked().tolist() == ranked[mark + 1 if after is not None else 0 :][:most]
    assert best.total == len(gaps)


def test_leaders_of_many_copies_across_tiles(monkeypatch):
    """A chain of small steps is no group; hundreds of copies are a group."""
    angles = np.concatenate([np.zeros(300), np.arange(10) * 0.1, np.zeros(300), [3.0]])
    x = EmbeddingRows(np.stack([np.cos(angles), np.sin(angles)], 1), "x")
    images = np.arange(len(angles))[::-1].copy()
    expected = lead(images.tolist(), np.cos(angles[:, None] - angles) > np.cos(0.15))
    assert leaders([x, x], images, float(np.cos(0.15)), tile=64) == expected
    assert len(set(expected.values())) < 10


def test_progress_tells_what_was_found(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0)
    rng = np.random.default_rng(0)
    blind_pairs(embeddings(rng, 30, 8, "rank 1"), embeddings(rng, 30, 8, "flat"), 0.9, 0.6, progress=True)
    assert "435 of 435 pairs" in (last := capsys.readouterr().err.splitlines()[-1]) and " found" in last
    with pair_comparison.pair_progress(30, True) as count:
        count(100, 3)
        count(200, 4)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("100 of 435 pairs") and "3 found" in first
    assert second.startswith("300 of 435 pairs") and "7 found" in second
