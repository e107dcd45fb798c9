"""Throws out nearly all pairs of images whose embeddings cannot be close, and never one that is.

Rows x, y of length 1 or 0 with xy > t lie within d = sqrt(2 - 2t) of each other, for |x - y|^2 = |x|^2 + |y|^2 - 2xy < 2 - 2t. An
orthogonal projection P to K dimensions brings no two points further apart, so |Px - Py| <= d. Px - c is rounded to whole multiples
of s, q(x) in -127..127; with e the largest rounding error of a row, the triangle inequality gives

    s |q(x) - q(y)| <= d + 2e =: R,    that is    |q(x)|^2 + |q(y)|^2 - 2 q(x)q(y) <= (R / s)^2,

integers, which int8 products compute without error. Float32 adds to e what it may err by in Px: see `_slack`.
The row's own |q(y)|^2 rides along in further columns of the product, so that the largest product of a row says whether it holds any
survivor: a tile is written once and read once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mof.pairs.core_threads import on_one_core
from mof.pairs.device_survivors import survivors
from mof.pairs.embedding_rows import CHUNK, EmbeddingRows

# Shapes: N images, D width of an embedding, K width after projection, W columns of the product (K and some for |q|^2),
# T rows of a tile, S survivors.

WIDTHS = ((28, 44, 60), (92, 124, 188, 252))
"""K to choose from, besides all of D: those that mostly do, then those for a flat spectrum. With the columns for |q|^2, W is mostly a
multiple of 16."""
SAMPLE = 2048
"""Rows on which K is tried; smaller collections are compared in full."""
SURVIVOR = 3e5
"""What a survivor costs to look at in full, in multiply-adds of an int8 product."""
TILE_COST = 32
"""What reading a product costs, in the same unit."""


@dataclass(frozen=True)
class Sieve:
    """What `sieve` prepares; `close` is all that is asked of it."""

    left: Tensor
    """[N', W], q(x) and constants; N' is N rounded up to whole 32s with rows that never survive"""
    right: Tensor
    """[N', W], q(y) and the digits of |q(y)|^2 / 2"""
    bounds: Tensor
    """[N'], the least product in the row of a survivor"""
    count: int
    """N"""

    def close(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """[S] i and [S] j, sorted, i < j, of the pairs that may be close in this square."""
        rows, columns = _whole(rows), _whole(columns)
        products, bounds = _multiply(self.left[rows], self.right[columns]), self.bounds[rows]  # [T, T], [T]
        row = (products.amax(1) >= bounds).nonzero()[:, 0]  # [R] that hold a survivor
        # Then the 32s of columns that do: to compare every product of a row, and look for what is true, takes longer than its maximum.
        pieces = products.index_select(0, row).view(-1, 32)  # [R T / 32, 32]
        across = products.shape[1] // 32
        bounds = bounds[row].repeat_interleave(across)  # [R T / 32]
        piece = (pieces.amax(1) >= bounds).nonzero()[:, 0]
        at, column = (pieces.index_select(0, piece) >= bounds[piece, None]).nonzero().unbind(1)  # [S]
        piece = piece[at]
        i, j = row[piece // across] + rows.start, piece % across * 32 + column + columns.start
        valid = (i < j) & (j < self.count)
        return i[valid], j[valid]

    def close_in(self, squares: list[tuple[slice, slice]]) -> Iterator[tuple[Tensor, Tensor]]:
        """As `close`, of several squares one by one; but a GPU does all of them at once."""
        if self.left.device.type == "cpu":
            yield from (self.close(*square) for square in squares)
            return
        whole = [(_whole(rows), _whole(columns)) for rows, columns in squares]
        yield survivors(self.left, self.right, self.bounds, self.count, whole, _multiply)


@dataclass(frozen=True)
class FullComparison:
    """Where a sieve would not pay: both products in full, with room for float32's rounding.

    A sum of D products errs by at most D 2^-24 of the product of the lengths, which are 1.
    """

    clip: EmbeddingRows
    above: float
    dino: EmbeddingRows | None = None
    below: float = 2.0

    def close(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """[S] i and [S] j, sorted, i < j, of the pairs that may be found in this square."""
        near = self._products(self.clip, rows, columns) > self.above - _room(self.clip)  # [T, T]
        if self.dino is not None:
            near &= self._products(self.dino, rows, columns) < self.below + _room(self.dino)
        i, j = near.triu(1 + rows.start - columns.start).nonzero().unbind(1)
        return i + rows.start, j + columns.start

    def close_in(self, squares: list[tuple[slice, slice]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same of several squares, one by one."""
        yield from (self.close(*square) for square in squares)

    @staticmethod
    def _products(rows_of: EmbeddingRows, rows: slice, columns: slice) -> Tensor:
        return rows_of.read(rows) @ rows_of.read(columns).T  # [T, T]


def sieve(clips: list[EmbeddingRows], above: float, dino: EmbeddingRows | None = None, below: float = 2.0) -> Sieve | FullComparison:
    """What costs least, judged by the pairs of a sample: a sieve of some width on one of `clips`, or none."""
    if len(clips[0]) >= 2 * SAMPLE and above > -1:
        full_cost = 4.0 * (clips[0].width + (dino.width if dino else 0))  # float32 is about a quarter as fast as int8
        best = on_one_core(lambda: _best_projection(clips, above, full_cost), clips[0].device)
        if best is not None:
            return build_sieve(*best, above)
    return FullComparison(clips[0], above, dino, below)


def build_sieve(x: EmbeddingRows, directions: Tensor, above: float) -> Sieve:
    """The sieve for one projection [D, K]."""
    projected = x.project(directions)  # [N, K]
    return on_one_core(lambda: _from_projected(projected, x.width, above), x.device)


def _best_projection(clips: list[EmbeddingRows], above: float, least: float) -> tuple[EmbeddingRows, Tensor] | None:
    """Which encoder by which directions [D, K], if any costs less than `least` multiply-adds a pair."""
    # Two samples: judged by the rows that they were fitted to, the directions of a flat spectrum would seem far too good.
    picked = torch.randperm(len(clips[0]), generator=torch.Generator().manual_seed(0))[: 2 * SAMPLE]  # [2 sample]
    best = None
    for clip in clips:
        some, others = (clip.take(part.sort().values) for part in picked.split(SAMPLE))  # [sample, D] each
        for group in (*WIDTHS, (clip.width,)):
            widths = [w for w in group if w <= clip.width and w + TILE_COST < least]
            if not widths:
                continue
            directions = torch.eye(clip.width) if widths == [clip.width] else principal_directions(some, widths[-1])  # [D, K]
            for width in widths:
                turned = _rotated(directions[:, :width].to(some.device))  # [D, K]
                cost = width + TILE_COST + SURVIVOR * _survival(others, turned, above)
                if cost < least:
                    least, best = cost, (clip, turned)
    return best


def principal_directions(some: Tensor, width: int) -> Tensor:
    """[D, width] orthonormal columns, largest variance first: two rounds of subspace iteration are plenty for a sieve."""
    centred = some - some.mean(0)  # [sample, D]
    basis = torch.randn(some.shape[1], width, generator=torch.Generator().manual_seed(0)).to(some.device)  # [D, width]
    for _ in range(2):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q  # [D, width]
    projected = centred @ basis  # [sample, width]
    return basis @ torch.linalg.eigh(projected.T @ projected).eigenvectors.flip(1)  # [D, width]


def _rotated(directions: Tensor) -> Tensor:
    """[D, K] the same space, but turned at random: so no coordinate is much larger than the others, and all are rounded finely."""
    turn = torch.randn(2 * [directions.shape[1]], generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # [K, K]
    return torch.linalg.qr(directions.double() @ turn.to(directions.device)).Q.float()


def _survival(some: Tensor, directions: Tensor, above: float) -> float:
    """Share of the pairs of a sample that a sieve would let through."""
    trial = _from_projected(some @ directions, some.shape[1], above)
    survivors = torch.count_nonzero(_multiply(trial.left, trial.right) >= trial.bounds[:, None]).item() - len(some)
    return survivors / (len(some) * (len(some) - 1))


def _slack(dimensions: int, width: int) -> float:
    """By how much a float32 projection of a unit row may err, at most: D 2^-24 in each of K coordinates (the standard bound for a
    sum of D products, both factors of unit length), and a little for lengths and directions that are not quite 1."""
    return (dimensions + 16) * width**0.5 * 2**-24 + 4e-6


def _from_projected(projected: Tensor, dimensions: int, above: float) -> Sieve:
    count, width = projected.shape  # [N, K]
    projected -= projected.mean(0)
    largest, longest = projected.abs().max().item(), torch.linalg.vector_norm(projected, dim=1).max().item()
    # |q| stays below 2,900, so that float32 holds every product exactly where int8 is not to be had.
    scale = max(largest / 127, longest / 2800, 1e-4)
    q = torch.zeros(-(-count // 32) * 32, width, dtype=torch.int8, device=projected.device)  # [N', K]
    error = 0.0
    for start in range(0, count, CHUNK):
        part = projected[start : start + CHUNK] / scale
        rounded = part.round()
        q[start : start + len(part)] = rounded.clamp_(-127, 127)
        error = max(error, torch.linalg.vector_norm(part - rounded, dim=1).max().item() * scale)
    # 1e-5: what the look in full, itself in float32, may err by in a cosine.
    radius = max(2 - 2 * above + 1e-5, 0) ** 0.5 + 2 * (error * (1 + 1e-5) + _slack(dimensions, width))
    return _with_squares(q, int((radius / scale) ** 2) + 1, count)


def _with_squares(q: Tensor, most: int, count: int) -> Sieve:
    """The sieve of pairs with |q(x) - q(y)|^2 <= most.

    q(x)q(y) - floor(|q(y)|^2 / 2) >= ceil((|q(x)|^2 - most) / 2) for all of them. The half square, less the least of all, is
    written as 127 (h1 + h2 + ...) + h0, digits that fit into int8.
    """
    squares = torch.cat([part.float().square().sum(1) for part in q.split(CHUNK)]).int()  # [N']
    halves = squares // 2
    least = halves[:count].min()
    halves = (halves - least).clamp(min=0)
    high, low = halves // 127, halves % 127
    digits = -(-int(high.max().item()) // 127)
    columns = [low, *((high - 127 * digit).clamp(0, 127) for digit in range(digits))]
    columns += [torch.zeros_like(low)] * (-(q.shape[1] + len(columns)) % 8)  # what CUDA asks for
    weights = torch.tensor([-1] + [-127] * (len(columns) - 1), dtype=torch.int8, device=q.device).expand(len(q), -1)
    bounds = -torch.div(most - squares, 2, rounding_mode="floor") + least
    bounds[count:] = torch.iinfo(torch.int32).max
    dtype = _fastest(q.device)
    left, right = torch.cat([q, weights], 1), torch.cat([q, torch.stack(columns, 1).to(torch.int8)], 1)  # [N', W]
    return Sieve(left.to(dtype), right.to(dtype), bounds.to(dtype if dtype.is_floating_point else torch.int32), count)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """left right^T: whole numbers, the same ones whether by int8 or by float32."""
    return left @ right.T if left.dtype.is_floating_point else torch._int_mm(left, right.T)


@lru_cache
def _fastest(device: torch.device) -> torch.dtype:
    """int8 where the processor multiplies it fast, else float32."""
    if device.type != "cpu":
        return torch.int8 if device.type == "cuda" else torch.float32
    seconds: dict[torch.dtype, list[float]] = {torch.int8: [], torch.float32: []}
    for dtype in [*seconds] * 8:
        some = torch.ones(512, 64, dtype=dtype)
        start = time.thread_time()  # what other processes do is not to count
        _multiply(some, some)
        seconds[dtype].append(time.thread_time() - start)
    return min(seconds, key=lambda dtype: min(seconds[dtype]))


def tiles(rows: range, columns: range, size: int) -> Iterator[tuple[slice, slice]]:
    """The squares on and above the diagonal of these rows and columns of a matrix of pairs, as rows and columns."""
    for r in range(rows.start, rows.stop, size):
        for c in range(columns.start, columns.stop, size):
            if c >= r:
                yield slice(r, min(r + size, rows.stop)), slice(c, min(c + size, columns.stop))


def _whole(part: slice) -> slice:
    """Up to the next multiple of 32."""
    return slice(part.start, -(-part.stop // 32) * 32)


def _room(x: EmbeddingRows) -> float:
    return (x.width + 16) * 2**-24 + 4e-6


__all__ = ["FullComparison", "Sieve", "build_sieve", "principal_directions", "sieve", "tiles"]
