"""The sieve throws out nearly all pairs of images whose embeddings cannot be close, and never a close pair.

Rows x, y of length 1 or 0 with xy > t lie within d = sqrt(2 - 2t) of each other, for |x - y|^2 = |x|^2 + |y|^2 - 2xy < 2 - 2t. An
orthogonal projection P to K dimensions brings no two points further apart, so |Px - Py| <= d. Px - c is rounded to whole multiples
of s, q(x) in -127..127; with e the largest rounding error of a row, the triangle inequality gives

    s |q(x) - q(y)| <= d + 2e =: R,    that is    |q(x)|^2 + |q(y)|^2 - 2 q(x)q(y) <= (R / s)^2,

integers, which int8 products compute without error, and so do float32 products, even if the program lets torch round their factors to
bfloat16. The error of Px in float32 is added to e: see `mof.pairs.projection`.
The row's own |q(y)|^2 rides along in further columns of the product, so that the largest product of a row says whether the row holds
a survivor: a tile is written once and read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mof.pairs.embedding_rows import EmbeddingRows

# Shapes: N images, N' = N rounded up to whole 32s, W columns of the product (K and some for |q|^2), T rows of a tile, S survivors,
# R rows of a tile that hold a survivor, P pieces of 32 columns.

PIECES = 1 << 16
"""Pieces that a GPU looks into at a time: 8 kB each for a W of 64."""


@dataclass(frozen=True)
class Sieve:
    """A sieve holds factors of a product of whole numbers below 2^24, and the least product of a close pair."""

    left: Tensor
    """[N', W], q(x) and constants; the rows behind N never survive"""
    right: Tensor
    """[N', W], q(y) and the digits of |q(y)|^2 / 2"""
    bounds: Tensor
    """[N'], the least product in the row of a survivor"""
    count: int
    """N"""

    def close(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the pairs i < j that may be close in this square: i [S] and j [S], sorted."""
        rows, columns = whole(rows), whole(columns)
        products, bounds = multiply(self.left[rows], self.right[columns]), self.bounds[rows]  # [T, T], [T]
        row = (products.amax(1) >= bounds).nonzero()[:, 0]  # [R]
        # Then the 32s of columns with a survivor: comparing every product of a row, and collecting, would take longer than its maximum.
        pieces = products.index_select(0, row).view(-1, 32)  # [R T / 32, 32]
        across = products.shape[1] // 32
        bounds = bounds[row].repeat_interleave(across)  # [R T / 32]
        piece = (pieces.amax(1) >= bounds).nonzero()[:, 0]  # [P]
        at, column = (pieces.index_select(0, piece) >= bounds[piece, None]).nonzero().unbind(1)  # [S]
        piece = piece[at]
        i, j = row[piece // across] + rows.start, piece % across * 32 + column + columns.start
        valid = (i < j) & (j < self.count)
        return i[valid], j[valid]

    def close_in(self, squares: list[tuple[slice, slice]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pairs of `close` for all squares together. A single square has so few that the next step would not pay."""
        yield joined([self.close(*square) for square in squares]) if self.left.device.type == "cpu" else self.close_at_once(squares)

    def close_at_once(self, squares: list[tuple[slice, slice]]) -> tuple[Tensor, Tensor]:
        """Return the pairs of `close` for all squares together, i [S] and j [S], for a GPU.

        The processor has to wait for the GPU to learn the number of survivors. It asks twice for all squares together: first
        which pieces of 32 columns hold a survivor, then which of the 32 columns, by a second product of these pieces alone.
        """
        holds, table, start = [], [], 0
        for rows, columns in squares:
            rows, columns = whole(rows), whole(columns)
            products = multiply(self.left[rows], self.right[columns])  # [T, T]
            pieces = products.view(len(products), -1, 32).amax(2) >= self.bounds[rows, None]  # [T, T / 32]
            holds.append(pieces.flatten())
            table.append((start, rows.start, columns.start, pieces.shape[1]))
            start += pieces.numel()
        starts, tops, lefts, across = torch.tensor(table, device=self.left.device).reshape(-1, 4).unbind(1)  # [squares] each
        flat = torch.cat([self.bounds.new_empty(0, dtype=torch.bool), *holds]).nonzero()[:, 0]  # [P]; here we wait
        square = torch.bucketize(flat, starts.contiguous(), right=True) - 1
        within = flat - starts[square]
        row, first = tops[square] + within // across[square], lefts[square] + within % across[square] * 32  # [P]
        return joined([self._in_pieces(*part) for part in zip(row.split(PIECES), first.split(PIECES), strict=True)])

    def _in_pieces(self, row: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Return the survivors in P rows, each at the 32 columns from its `first` on: i [S] and j [S]."""
        columns = first[:, None] + torch.arange(32, device=first.device)  # [P, 32]
        products = (self.right[columns].float() @ self.left[row].float()[:, :, None])[:, :, 0]  # [P, 32]
        survives = (products >= self.bounds[row, None]) & (row[:, None] < columns) & (columns < self.count)  # [P, 32]
        at, place = survives.nonzero().unbind(1)  # [S]; here we wait
        return row[at], columns[at, place]


@dataclass(frozen=True)
class FullComparison:
    """FullComparison serves where a sieve would not pay. It computes both products in full, with room for their rounding.

    A sum of D products errs by at most D 2^-24 of the product of the lengths, which are 1. A program may also let torch round the
    factors of float32 products to TF32 or bfloat16: 2^-8 of each factor.
    """

    clip: EmbeddingRows
    above: float
    dino: EmbeddingRows | None = None
    below: float = 2.0

    def close(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the pairs i < j that may be blind in this square: i [S] and j [S], sorted."""
        near = self._products(self.clip, rows, columns) > self.above - _room(self.clip)  # [T, T]
        if self.dino is not None:
            near &= self._products(self.dino, rows, columns) < self.below + _room(self.dino)
        i, j = near.triu(1 + rows.start - columns.start).nonzero().unbind(1)
        return i + rows.start, j + columns.start

    def close_in(self, squares: list[tuple[slice, slice]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pairs of `close`, square by square."""
        yield from (self.close(*square) for square in squares)

    @staticmethod
    def _products(embeddings: EmbeddingRows, rows: slice, columns: slice) -> Tensor:
        return embeddings.read(rows) @ embeddings.read(columns).T  # [T, T]


def tiles(rows: range, columns: range, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield the squares on and above the diagonal that cover these rows and columns of a matrix of pairs, as rows and columns."""
    for r in range(rows.start, rows.stop, size):
        for c in range(columns.start, columns.stop, size):
            if c >= r:
                yield slice(r, min(r + size, rows.stop)), slice(c, min(c + size, columns.stop))


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the i and the j of all parts. There is at least one part."""
    i, j = zip(*parts, strict=True)
    return torch.cat(i), torch.cat(j)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T: whole numbers, the same for int8 and float32."""
    return left @ right.T if left.dtype.is_floating_point else torch._int_mm(left, right.T)


def whole(part: slice) -> slice:
    """Return the slice up to the next multiple of 32."""
    return slice(part.start, -(-part.stop // 32) * 32)


def _room(x: EmbeddingRows) -> float:
    return 2**-7 + 2**-16 + (x.width + 16) * 2**-24 + 4e-6
