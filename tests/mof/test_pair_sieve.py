"""The sieve never loses a close pair, for any embeddings and projection; it is chosen if it pays; squares cover the triangle once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spectra import SPECTRA, clustered, embeddings

from mof.pairs import projection
from mof.pairs import sieve as pair_sieve
from mof.pairs.embedding_rows import EmbeddingRows
from mof.pairs.projection import build_sieve, principal_directions, sieve
from mof.pairs.sieve import FullComparison, Sieve, tiles


def survivors(sieve: Sieve | FullComparison, count: int, tile: int) -> set[tuple[int, int]]:
    found = [torch.stack(sieve.close(*square), 1) for square in tiles(range(count), range(count), tile)]
    pairs = torch.cat([torch.empty(0, 2, dtype=torch.int64), *found]).tolist()
    assert len(pairs) == len(set(map(tuple, pairs)))
    return set(map(tuple, pairs))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.sampled_from([1, 2, 33, 150]),
    spectrum=st.sampled_from(SPECTRA),
    above=st.sampled_from([-0.5, 0.0, 0.5, 0.9, 0.95, 0.9999, 1.0]),
    width=st.sampled_from([1, 5, 28, 48]),
    tile=st.sampled_from([32, 96, 1024]),
)
@pytest.mark.filterwarnings("ignore:x. rows are not of unit length")
def test_no_close_pair_is_lost(seed, count, spectrum, above, width, tile):
    rng = np.random.default_rng(seed)
    x = embeddings(rng, count, 48, spectrum, above)
    directions = np.linalg.qr(rng.normal(size=(48, width)))[0].astype(np.float32)  # any projection will do
    close = build_sieve(EmbeddingRows(x, "x"), torch.from_numpy(directions), above)
    cosines = x.astype(np.float64) @ x.T.astype(np.float64)
    must = set(zip(*(i.tolist() for i in np.nonzero(np.triu(cosines > above, 1))), strict=True))
    assert must <= survivors(close, count, tile)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.sampled_from([1, 2, 33, 150]),
    spectrum=st.sampled_from(SPECTRA),
    above=st.sampled_from([-0.5, 0.5, 0.95, 1.0]),
    dtype=st.sampled_from([torch.int8, torch.float32]),
    pieces=st.sampled_from([1, 7, 1 << 16]),
)
@pytest.mark.filterwarnings("ignore:x. rows are not of unit length")
def test_all_squares_at_once_as_one_by_one(seed, count, spectrum, above, dtype, pieces):
    """A GPU compares all squares at once; here the CPU does it."""
    rng = np.random.default_rng(seed)
    directions = torch.from_numpy(np.linalg.qr(rng.normal(size=(48, 12)))[0].astype(np.float32))
    squares = list(tiles(range(count), range(count), 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "_fastest", lambda device: dtype)
        patch.setattr(pair_sieve, "PIECES", pieces)
        close = build_sieve(EmbeddingRows(embeddings(rng, count, 48, spectrum, above), "x"), directions, above)
        i, j = close.close_at_once(squares)
    assert len(i) == len(set(zip(i.tolist(), j.tolist(), strict=True)))
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == survivors(close, count, 64)


def test_int8_and_float32_give_the_same_integers(monkeypatch):
    x = EmbeddingRows(clustered(np.random.default_rng(0), 300), "x")
    directions = principal_directions(x.read(slice(None)), 28)
    found = {}
    for dtype in (torch.int8, torch.float32):
        monkeypatch.setattr(projection, "_fastest", lambda device, dtype=dtype: dtype)
        close = build_sieve(x, directions, 0.97)
        assert close.left.dtype == dtype
        found[dtype] = survivors(close, 300, 128)
    assert found[torch.int8] == found[torch.float32]
    assert len(found[torch.int8]) < 300 * 299 / 2 / 5  # it does sift


def test_integers_stay_within_what_float32_holds_exactly():
    x = EmbeddingRows(np.kron(np.eye(2), np.ones((1, 1024), np.float32) / 32), "x")  # all coordinates alike: |q| at its largest
    close = build_sieve(x, torch.eye(2048), 0.9)
    q = close.left[:, :2048].double()
    assert q.square().sum(1).max() * 2 < 2**24
    assert not survivors(close, 2, 32)


def test_the_width_is_chosen_by_the_spectrum_and_the_threshold(monkeypatch):
    monkeypatch.setattr(projection, "SAMPLE", 500)
    rng = np.random.default_rng(1)
    rows = {name: EmbeddingRows(embeddings(rng, 2000, 320, name), "x") for name in ("flat", "steep")}
    flat = sieve([rows["flat"]], 0.9)
    steep = sieve([rows["steep"]], 0.9999)
    assert isinstance(flat, Sieve) and isinstance(steep, Sieve)
    assert steep.left.shape[1] < 64 < flat.left.shape[1]
    assert isinstance(sieve([rows["flat"]], -0.5), FullComparison)  # nearly all pairs survive
    both = sieve([rows["flat"], rows["steep"]], 0.9999)
    assert isinstance(both, Sieve) and both.left.shape[1] < 64  # the better of two encoders


def test_small_collections_are_compared_in_full():
    x = EmbeddingRows(np.eye(5), "x")
    assert isinstance(sieve([x], 0.9), FullComparison)


@given(count=st.integers(0, 40), size=st.integers(1, 50))
def test_tiles_cover_the_upper_triangle_once(count, size):
    seen = np.zeros((count, count), dtype=int)
    for rows, columns in tiles(range(count), range(count), size):
        seen[rows, columns] += 1
    assert (seen[np.triu_indices(count)] == 1).all()
    assert seen.max(initial=0) <= 1


@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 40),
    width=st.integers(1, 40),
    largest=st.sampled_from([0, 1, 30, 127]),
    share=st.floats(0, 1),
)
def test_the_distance_of_integers_is_exact_but_for_halves(seed, count, width, largest, share):
    q = np.random.default_rng(seed).integers(-largest, largest + 1, size=(count, width))
    distances = np.square(q[:, None] - q[None]).sum(2)  # [count, count]
    most = int(share * distances.max())
    padded = np.zeros((-(-count // 32) * 32, width))
    padded[:count] = q
    found = survivors(projection._with_squares(torch.from_numpy(padded).to(torch.int8), most, count), count, 32)
    upper = set(zip(*(i.tolist() for i in np.nonzero(np.triu(distances <= most, 1))), strict=True))
    assert upper <= found <= set(zip(*(i.tolist() for i in np.nonzero(np.triu(distances <= most + 2, 1))), strict=True))
