"""The survivors of the sieve in several squares at once, for a GPU.

To learn how many there are, the processor has to wait for the GPU. So it asks twice for all squares together: first which 32s of
columns hold a survivor, then which of the 32, by a second product of these alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Shapes: N' rows, W columns of the product's factors, T rows of a square, P pieces of 32 columns, S survivors.

PIECES = 1 << 16
"""Pieces that are looked into at a time: 8 kB each for a W of 64."""


def survivors(
    left: Tensor,
    right: Tensor,
    bounds: Tensor,
    count: int,
    squares: list[tuple[slice, slice]],
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """[S] i and [S] j of the pairs i < j < `count` with `left`[i] `right`[j] >= `bounds`[i].

    Args:
        left, right: [N', W] whole numbers, whose products stay below 2^24.
        bounds: [N']
        squares: rows and columns, from and to multiples of 32.
        multiply: left right^T.
    """
    holds, table, start = [], [], 0
    for rows, columns in squares:
        products = multiply(left[rows], right[columns])  # [T, T]
        pieces = products.view(len(products), -1, 32).amax(2) >= bounds[rows, None]  # [T, T / 32]
        holds.append(pieces.flatten())
        table.append((start, rows.start, columns.start, pieces.shape[1]))
        start += pieces.numel()
    starts, tops, lefts, across = torch.tensor(table, device=left.device).reshape(-1, 4).unbind(1)  # [squares] each
    flat = torch.cat([bounds.new_empty(0, dtype=torch.bool), *holds]).nonzero()[:, 0]  # [P]; here we wait
    square = torch.bucketize(flat, starts.contiguous(), right=True) - 1
    within = flat - starts[square]
    row, first = tops[square] + within // across[square], lefts[square] + within % across[square] * 32  # [P]
    some = zip(row.split(PIECES), first.split(PIECES), strict=True)
    return joined([_in_pieces(left, right, bounds, count, *few) for few in some])


def _in_pieces(left: Tensor, right: Tensor, bounds: Tensor, count: int, row: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Those in P rows, each at the 32 columns from its `first` on."""
    columns = first[:, None] + torch.arange(32, device=first.device)  # [P, 32]
    products = (right[columns].float() @ left[row].float()[:, :, None])[:, :, 0]  # [P, 32]
    survives = (products >= bounds[row, None]) & (row[:, None] < columns) & (columns < count)  # [P, 32]
    at, place = survives.nonzero().unbind(1)  # [S]; here we wait
    return row[at], columns[at, place]


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The i and the j of all parts, of which there is at least one."""
    i, j = zip(*parts, strict=True)
    return torch.cat(i), torch.cat(j)


__all__ = ["joined", "survivors"]
