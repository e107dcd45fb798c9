"""Blind pairs against brute force: the same pairs whatever the spectrum, the sieve, the tiles, the thresholds and the encoders."""

import csv
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.spectra import SPECTRA, clustered, embeddings
from torch.overrides import TorchFunctionMode

from encoders import FeatureStore, build_encoder, encode_images
from mof import blind_pairs
from mof.pairs import comparison, projection
from mof.pairs.comparison import PairComparison
from mof.pairs.core_threads import on_each_core
from mof.pairs.embedding_rows import EmbeddingRows
from mof.pairs.sieve import Sieve

SLACK = 2e-6


def tiles_of(rows: int):
    """Let the search compare so many rows at a time."""
    return mock.patch.object(comparison, "TILE", rows)


def sieved():
    """Let even small collections go through a sieve, whether it pays or not."""
    return mock.patch.multiple(projection, SAMPLE=4, SURVIVOR=0.0, TILE_COST=0)


class RoundedFactors(TorchFunctionMode):
    """Products of float32 with factors in bfloat16, as processors compute them after `torch.set_float32_matmul_precision("medium")`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__) and args[0].dtype == torch.float32:
            args = [factor.bfloat16().float() for factor in args]
        return function(*args, **(kwargs or {}))


def brute_force(clip: np.ndarray, dino: np.ndarray, above: float, below: float) -> tuple[set, set]:
    """Return the pairs that must be found, and the pairs that may be found."""
    a, b = clip.astype(np.float64) @ clip.T.astype(np.float64), dino.astype(np.float64) @ dino.T.astype(np.float64)
    upper = np.triu(np.ones(a.shape, dtype=bool), 1)
    must = (a > above + SLACK) & (b < below - SLACK) & upper
    may = (a > above - SLACK) & (b < below + SLACK) & upper
    return set(zip(*np.nonzero(must), strict=True)), set(zip(*np.nonzero(may), strict=True))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.sampled_from([0, 1, 2, 3, 17, 64, 130]),
    spectra=st.tuples(*[st.sampled_from(SPECTRA)] * 2),
    above=st.sampled_from([-1.0, 0.0, 0.5, 0.9, 0.95, 1.0]),
    below=st.sampled_from([-1.0, 0.0, 0.6, 0.95, 1.0]),
    tile=st.sampled_from([32, 64, 1024, 2048]),
    forced=st.booleans(),
    rounded=st.booleans(),
)
def test_the_same_pairs_as_brute_force(seed, count, spectra, above, below, tile, forced, rounded):
    rng = np.random.default_rng(seed)
    clip, dino = embeddings(rng, count, 48, spectra[0], above), embeddings(rng, count, 40, spectra[1], below)
    warned = pytest.warns(UserWarning) if "zeros" in spectra and count // 3 else nullcontext()
    with warned, sieved() if forced else nullcontext(), tiles_of(tile), RoundedFactors() if rounded else nullcontext():
        pairs = blind_pairs(clip, dino, above, below)
    must, may = brute_force(clip, dino, above, below)
    found = set(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True))
    assert len(found) == len(pairs) == pairs.total
    assert must <= found <= may
    assert (np.diff(pairs.gap) <= 0).all()
    np.testing.assert_allclose(pairs.clip_similarity, (clip[pairs.i] * clip[pairs.j]).sum(1), atol=1e-6)
    np.testing.assert_allclose(pairs.dino_similarity, (dino[pairs.i] * dino[pairs.j]).sum(1), atol=1e-6)


def test_a_large_collection_takes_the_narrow_way_to_the_same_pairs():
    rng = np.random.default_rng(2)
    clip, dino = clustered(rng, 4500), embeddings(rng, 4500, 64, "flat")
    search = PairComparison(*([EmbeddingRows(x, "x")] for x in (clip, dino)), 0.97, 0.6)
    assert isinstance(search.sieve, Sieve) and search.sieve.left.shape[1] < 150
    with tiles_of(704):
        pairs = blind_pairs(torch.from_numpy(clip), torch.from_numpy(dino), 0.97, 0.6)
    must, may = brute_force(clip, dino, 0.97, 0.6)
    assert must <= set(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True)) <= may
    assert len(must) > 100


def test_all_squares_at_once_give_the_same_pairs(monkeypatch):
    rng = np.random.default_rng(6)
    clip, dino = clustered(rng, 4500), embeddings(rng, 4500, 64, "flat")
    expected = blind_pairs(clip, dino, 0.97, 0.6)
    asked = []

    def at_once(self, squares):
        asked.append(len(squares))
        yield self.close_at_once(squares)

    monkeypatch.setattr(Sieve, "close_in", at_once)
    with tiles_of(704):
        found = blind_pairs(clip, dino, 0.97, 0.6)
    assert sum(asked) == 7 * 8 // 2 and len(found) > 100
    for name in ("i", "j", "clip_similarity", "dino_similarity"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("forced", [False, True])
def test_with_several_encoders_a_pair_must_pass_them_all(forced):
    rng = np.random.default_rng(5)
    clips = [embeddings(rng, 60, width, "duplicates") for width in (16, 48, 64)]
    dinos = [embeddings(rng, 60, width, "flat") for width in (8, 12)]
    with sieved() if forced else nullcontext():
        pairs = blind_pairs(clips, tuple(dinos), 0.9, 0.6)
    must = set.intersection(*(brute_force(clip, dino, 0.9, 0.6)[0] for clip in clips for dino in dinos))
    may = set.intersection(*(brute_force(clip, dino, 0.9, 0.6)[1] for clip in clips for dino in dinos))
    assert must <= set(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True)) <= may
    assert 0 < len(must) < len(brute_force(clips[0], dinos[0], 0.9, 0.6)[0])
    each = np.stack([(x[pairs.i] * x[pairs.j]).sum(1) for x in clips])
    np.testing.assert_allclose(pairs.clip_similarity, each.min(0), atol=1e-6)
    np.testing.assert_allclose(pairs.dino_similarity, np.max([(x[pairs.i] * x[pairs.j]).sum(1) for x in dinos], 0), atol=1e-6)


def test_rows_of_any_length_are_normalised_and_said_so():
    rng = np.random.default_rng(3)
    clip, dino = embeddings(rng, 30, 16, "usual"), embeddings(rng, 30, 16, "flat")
    with pytest.warns(UserWarning, match="clip"):
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
    half = torch.from_numpy(clip).bfloat16()
    rounded = torch.nn.functional.normalize(half.float())
    with pytest.warns(UserWarning, match="clip"):
        np.testing.assert_array_equal(blind_pairs(half, dino, 0.8, 0.6).i, blind_pairs(rounded, dino, 0.8, 0.6).i)
    turned = np.asfortranarray(clip.astype(np.float64))[::-1]
    assert len(blind_pairs(turned, dino[::-1], 0.8, 0.6)) == len(mapped) > 0


@pytest.mark.parametrize(
    ("clip", "dino", "message"),
    [
        (np.ones(4), np.ones((4, 2)), r"clip .*\[4\]"),
        (np.eye(4), np.eye(3), "4.*dino 3"),
        ([], np.eye(2), "clip .*empty"),
        ([np.eye(4), np.eye(3)], np.eye(4), r"4.*clip\[1\] 3"),
        (np.eye(4), [np.eye(4), np.ones(4)], r"dino\[1\].*\[4\]"),
        (np.array([[1.0, 0], [np.nan, 0]]), np.eye(2), "clip .*1 of 2 .*row 1"),
        (np.eye(2), np.array([[np.inf, 0], [1, 0]]), "dino .*1 of 2 .*row 0"),
    ],
)
def test_bad_input(clip, dino, message):
    with pytest.raises(ValueError, match=message):
        blind_pairs(clip, dino)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_above": float("nan")}, "clip_above=nan"),
        ({"max_pairs": -1}, "max_pairs .*-1"),
        ({"per_cluster": 0}, "per_cluster .*0"),
        ({"duplicates_above": 95}, "duplicates_above .*95"),
        ({"duplicates_by": np.eye(2)}, "duplicates_above"),
        ({"duplicates_by": np.eye(3), "duplicates_above": 0.9}, "2.*duplicates_by 3"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        blind_pairs(np.eye(2), np.eye(2), **arguments)


def test_lengths_beyond_what_squares_in_float32_can_hold():
    clip = np.array([[3, 4, 0], [3, 4, 0.1], [0, 0, 1]], dtype=np.float32)
    for scale in (1e-25, 1e30):
        with pytest.warns(UserWarning, match="clip"):
            pairs = blind_pairs(clip * np.float32(scale), np.eye(3), 0.9, 0.6)
        assert (pairs.i.tolist(), pairs.j.tolist()) == ([0], [1])
        assert pairs.clip_similarity[0] == pytest.approx(5 / 25.01**0.5, abs=1e-6)


def test_files_and_summary(tmp_path):
    clip = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    dino = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    pairs = blind_pairs(clip, dino)
    assert (pairs.i.tolist(), pairs.j.tolist()) == ([0], [1])
    assert pairs.summary() == "1 blind pairs among 3 images (3 pairs); gap 1.000 to 1.000"
    assert blind_pairs(clip, clip).summary() == "0 blind pairs among 3 images (3 pairs)"
    pairs.to_parquet(tmp_path / "pairs.parquet")
    pairs.to_csv(tmp_path / "pairs.csv")
    row = {"i": 0, "j": 1, "clip_similarity": 1.0, "dino_similarity": 0.0, "gap": 1.0}
    assert pq.read_table(tmp_path / "pairs.parquet").to_pylist() == [row]
    assert [{k: float(v) for k, v in line.items()} for line in csv.DictReader((tmp_path / "pairs.csv").open())] == [row]
    names = ["a.png", 'b,"ü".png', "c.png"]
    pairs.to_parquet(tmp_path / "named.parquet", names)
    pairs.to_csv(tmp_path / "named.csv", names)
    named = {"i": 0, "j": 1, "image_i": names[0], "image_j": names[1], **row}
    assert pq.read_table(tmp_path / "named.parquet").to_pylist() == [named]
    with (tmp_path / "named.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in named.items()}]
    with pytest.raises(ValueError, match="2 .*3"):
        pairs.to_csv(tmp_path / "named.csv", names[:2])


def test_stores_stand_for_the_encoders_they_were_opened_with(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(12):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(tmp_path / f"images/{n}.png")
    encoders = {name: build_encoder(name) for name in ("tiny-a", "tiny-b")}
    encode_images(tmp_path / "images", encoders, tmp_path / "store")
    single, both = FeatureStore(tmp_path / "store", ["tiny-b"]), FeatureStore(tmp_path / "store")
    found = blind_pairs(both, single, -1, 1)
    arrays = blind_pairs([both.embeddings("tiny-a"), both.embeddings("tiny-b")], single.embeddings("tiny-b"), -1, 1)
    assert len(found) == 66
    np.testing.assert_array_equal(found.clip_similarity, arrays.clip_similarity)
    np.testing.assert_array_equal(found.i, arrays.i)
    encode_images(tmp_path / "images/3.png", encoders, tmp_path / "other")
    with pytest.raises(ValueError, match=r"store \(tiny-a, tiny-b\) and .*other \(tiny-b\) "):
        blind_pairs(both, FeatureStore(tmp_path / "other", ["tiny-b"]))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_rules_on_tiny_collections(count):
    rules = {"one_per_image": True, "per_cluster": 1, "duplicates_above": 0.999, "max_pairs": 3}
    pairs = blind_pairs(np.ones((count, 3)) / 3**0.5, np.eye(count, 3), -1, 1, **rules)
    assert (len(pairs), pairs.total, pairs.images) == (count // 2, count // 2, count)


def test_the_precision_of_the_program_is_not_touched():
    with mock.patch.object(torch, "set_float32_matmul_precision") as for_all_threads, torch.autocast("cpu", torch.bfloat16):
        pairs = blind_pairs(np.eye(2), np.eye(2), -0.5, 0.5)
    assert len(pairs) == 1 and pairs.clip_similarity.dtype == np.float32 and not for_all_threads.called


def test_each_worker_has_one_thread_and_the_program_keeps_its_number():
    """The matrix library, too: it takes the program's number when that was set."""

    def numbers(_) -> list[str]:
        return re.findall(r"get_(?:max|num)_threads\(\) : (\d+)", torch.__config__.parallel_info())

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        program = numbers(None)
        with mock.patch.object(torch, "set_num_threads") as for_all_threads:
            seen = list(on_each_core(numbers, range(20), torch.device("cpu")))
        assert not for_all_threads.called
        assert all(set(worker) == {"1"} for worker in seen)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
        assert numbers(None) == program
    finally:
        torch.set_num_threads(before)
