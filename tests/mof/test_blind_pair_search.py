"""Blind pairs against brute force: the same pairs whatever the spectrum, the tiles and the thresholds."""

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mof import blind_pairs
from mof.blind_pair_search import contract, tiles, unit_rows

SLACK = 2e-6


def embeddings(rng: np.random.Generator, count: int, width: int, spectrum: str) -> np.ndarray:
    """Unit rows around a common direction, as CLIP's are; "duplicates" and "zeros" spoil some."""
    decay = {"flat": 0.0, "steep": 1.5}.get(spectrum, 0.7)
    x = rng.normal(size=(count, width)) / (1 + np.arange(width)) ** decay
    x[:, 0] += rng.choice([0.5, 3.0])
    if spectrum == "duplicates" and count:
        x[rng.integers(count, size=count // 2)] = x[0]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    if spectrum == "zeros" and count:
        x[rng.integers(count, size=count // 3)] = 0
    return x.astype(np.float32)


def brute_force(clip: np.ndarray, dino: np.ndarray, above: float, below: float) -> tuple[set, set]:
    """The pairs that must be found and those that may be."""
    a, b = clip.astype(np.float64) @ clip.T.astype(np.float64), dino.astype(np.float64) @ dino.T.astype(np.float64)
    upper = np.triu(np.ones(a.shape, dtype=bool), 1)
    must = (a > above + SLACK) & (b < below - SLACK) & upper
    may = (a > above - SLACK) & (b < below + SLACK) & upper
    return set(zip(*np.nonzero(must), strict=True)), set(zip(*np.nonzero(may), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.sampled_from([0, 1, 2, 3, 17, 64, 130]),
    spectra=st.tuples(*[st.sampled_from(["flat", "steep", "usual", "duplicates", "zeros"])] * 2),
    above=st.sampled_from([-1.0, 0.0, 0.5, 0.9, 0.95, 1.0]),
    below=st.sampled_from([-1.0, 0.0, 0.6, 0.95, 1.0]),
    tile=st.sampled_from([1, 7, 64, 2048]),
)
def test_the_same_pairs_as_brute_force(seed, count, spectra, above, below, tile):
    rng = np.random.default_rng(seed)
    clip, dino = embeddings(rng, count, 48, spectra[0]), embeddings(rng, count, 40, spectra[1])
    with pytest.warns(UserWarning) if "zeros" in spectra and count // 3 else np.errstate():
        pairs = blind_pairs(clip, dino, above, below, tile=tile)
    must, may = brute_force(clip, dino, above, below)
    found = set(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True))
    assert len(found) == len(pairs)
    assert must <= found <= may
    gap = (pairs.clip_similarity - pairs.dino_similarity).astype(np.float64)
    assert (np.diff(gap) <= 1e-6).all()
    np.testing.assert_allclose(pairs.clip_similarity, (clip[pairs.i] * clip[pairs.j]).sum(1), atol=1e-6)
    np.testing.assert_allclose(pairs.dino_similarity, (dino[pairs.i] * dino[pairs.j]).sum(1), atol=1e-6)


@pytest.mark.parametrize("spectrum", ["flat", "steep", "usual", "duplicates", "zeros"])
def test_contraction_never_loses_a_pair(spectrum):
    x = torch.from_numpy(embeddings(np.random.default_rng(1), 2500, 96, spectrum))
    for above in (0.6, 0.95):
        narrow = contract(x, above)
        assert ((narrow @ narrow.T) - (x @ x.T)).min() > -1e-5


def clustered(rng: np.random.Generator) -> np.ndarray:
    """2,600 unit rows about 200 centres: close within a cluster, far between."""
    x = np.repeat(rng.normal(size=(200, 192)) / (1 + np.arange(192)) ** 0.7, 13, axis=0)
    x += 0.01 * rng.normal(size=x.shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_a_large_collection_takes_the_narrow_way_to_the_same_pairs():
    rng = np.random.default_rng(2)
    clip, dino = clustered(rng), embeddings(rng, 2600, 64, "flat")
    assert contract(torch.from_numpy(clip), 0.97).shape[1] < 192
    pairs = blind_pairs(torch.from_numpy(clip), torch.from_numpy(dino), 0.97, 0.6, tile=700)
    must, may = brute_force(clip, dino, 0.97, 0.6)
    assert must <= set(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True)) <= may
    assert len(must) > 100


@given(count=st.integers(0, 40), size=st.integers(1, 50))
def test_tiles_cover_the_upper_triangle_once(count, size):
    seen = np.zeros((count, count), dtype=int)
    for rows, columns in tiles(count, size):
        seen[rows, columns] += 1
    assert (seen[np.triu_indices(count)] == 1).all()
    assert seen.max(initial=0) <= 1


def test_rows_of_any_length_are_normalised_and_said_so():
    rng = np.random.default_rng(3)
    clip, dino = embeddings(rng, 30, 16, "usual"), embeddings(rng, 30, 16, "flat")
    with pytest.warns(UserWarning, match="not of unit length"):
        scaled = blind_pairs(clip * rng.uniform(0.5, 9, (30, 1)), dino, 0.8, 0.6)
    plain = blind_pairs(clip, dino, 0.8, 0.6)
    assert len(plain) > 0
    np.testing.assert_array_equal(scaled.i, plain.i)
    np.testing.assert_array_equal(scaled.j, plain.j)


def test_half_precision_and_memory_maps(tmp_path):
    rng = np.random.default_rng(4)
    clip, dino = embeddings(rng, 20, 16, "usual"), embeddings(rng, 20, 16, "flat")
    np.save(tmp_path / "clip.npy", clip)
    mapped = blind_pairs(np.load(tmp_path / "clip.npy", mmap_mode="r"), dino, 0.8, 0.6)
    np.testing.assert_array_equal(mapped.clip_similarity, blind_pairs(clip, dino, 0.8, 0.6).clip_similarity)
    assert unit_rows(torch.ones(2, 4, dtype=torch.bfloat16) / 2, "clip").dtype == torch.float32


@pytest.mark.parametrize(
    ("clip", "dino", "message"),
    [
        (np.ones(4), np.ones((4, 2)), r"clip must be embeddings of shape \[N, D\], got \[4\]"),
        (np.eye(4), np.eye(3), "clip has 4 rows, dino 3"),
        (np.array([[1.0, 0], [np.nan, 0]]), np.eye(2), "clip has NaN or infinity in 1 of 2 rows, the first is row 1"),
        (np.eye(2), np.array([[np.inf, 0], [1, 0]]), "dino has NaN or infinity in 1 of 2 rows, the first is row 0"),
    ],
)
def test_bad_input(clip, dino, message):
    with pytest.raises(ValueError, match=message):
        blind_pairs(clip, dino)


def test_bad_thresholds():
    with pytest.raises(ValueError, match="thresholds must be numbers"):
        blind_pairs(np.eye(2), np.eye(2), clip_above=float("nan"))


def test_files_and_summary(tmp_path):
    clip = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    dino = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    pairs = blind_pairs(clip, dino)
    assert (pairs.i.tolist(), pairs.j.tolist()) == ([0], [1])
    assert pairs.summary() == "1 blind pairs among 3 images (3 pairs); gap 1.000 to 1.000"
    assert blind_pairs(clip, clip).summary() == "0 blind pairs among 3 images (3 pairs)"
    pairs.to_parquet(tmp_path / "pairs.parquet")
    pairs.to_csv(tmp_path / "pairs.csv")
    row = {"i": 0, "j": 1, "clip_similarity": 1.0, "dino_similarity": 0.0}
    assert pq.read_table(tmp_path / "pairs.parquet").to_pylist() == [row]
    assert [{k: float(v) for k, v in one.items()} for one in csv.DictReader((tmp_path / "pairs.csv").open())] == [row]
