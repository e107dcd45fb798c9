"""`sieve` chooses the projection of the embeddings that costs least, and rounds it to whole numbers."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor

from mof.pairs.core_threads import on_one_core
from mof.pairs.embedding_rows import CHUNK, EmbeddingRows
from mof.pairs.sieve import FullComparison, Sieve, multiply

# Shapes: N images, N' = N rounded up to whole 32s, D width of an embedding, K width after projection, W columns of the product.

WIDTHS = ((28, 44, 60), (92, 124, 188, 252))
"""K to choose from, besides all of D: the usual widths, then those for a flat spectrum. With the columns for |q|^2, W is mostly a
multiple of 16."""
SAMPLE = 2048
"""Rows on which K is tried; smaller collections are compared in full."""
SURVIVOR = 3e5
"""Cost of the full comparison of a survivor, in multiply-adds of an int8 product."""
TILE_COST = 32
"""Cost of reading a product, in the same unit."""


def sieve(clips: list[EmbeddingRows], above: float, dino: EmbeddingRows | None = None, below: float = 2.0) -> Sieve | FullComparison:
    """Return the cheapest comparison, judged by the pairs of a sample: a sieve on one of `clips`, or the full comparison."""
    if len(clips[0]) >= 2 * SAMPLE and above > -1:
        full_cost = 4.0 * (clips[0].width + (dino.width if dino else 0))  # float32 is about a quarter as fast as int8
        best = on_one_core(lambda: _best_projection(clips, above, full_cost), clips[0].device)
        if best is not None:
            return build_sieve(*best, above)
    return FullComparison(clips[0], above, dino, below)


def build_sieve(x: EmbeddingRows, directions: Tensor, above: float) -> Sieve:
    """Return the sieve of one projection [D, K]."""
    projected = x.project(directions)  # [N, K]
    return on_one_core(lambda: _from_projected(projected, above), x.device)


def _best_projection(clips: list[EmbeddingRows], above: float, least: float) -> tuple[EmbeddingRows, Tensor] | None:
    """Return the encoder and the directions [D, K] that cost least; None if all cost more than `least` multiply-adds a pair."""
    # Two samples: judged by the rows that they were fitted to, the directions of a flat spectrum would seem far too good.
    picked = torch.randperm(len(clips[0]), generator=torch.Generator().manual_seed(0))[: 2 * SAMPLE]  # [2 SAMPLE]
    best = None
    for clip in clips:
        fitted, judged = (clip.take(part.sort().values) for part in picked.split(SAMPLE))  # [SAMPLE, D] each
        for group in (*WIDTHS, (clip.width,)):
            widths = [w for w in group if w <= clip.width and w + TILE_COST < least]
            if not widths:
                continue
            directions = torch.eye(clip.width) if widths == [clip.width] else principal_directions(fitted, widths[-1])  # [D, K]
            for width in widths:
                turned = _rotated(directions[:, :width].to(fitted.device))  # [D, K]
                cost = width + TILE_COST + SURVIVOR * _survival(judged, turned, above)
                if cost < least:
                    least, best = cost, (clip, turned)
    return best


def principal_directions(rows: Tensor, width: int) -> Tensor:
    """Return orthonormal columns, largest variance first, shape [D, width]: two rounds of subspace iteration are plenty for a sieve."""
    centred = rows - rows.mean(0)  # [SAMPLE, D]
    basis = torch.randn(rows.shape[1], width, generator=torch.Generator().manual_seed(0)).to(rows.device)  # [D, width]
    for _ in range(2):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q  # [D, width]
    projected = centred @ basis  # [SAMPLE, width]
    return basis @ torch.linalg.eigh(projected.T @ projected).eigenvectors.flip(1)  # [D, width]


def _rotated(directions: Tensor) -> Tensor:
    """Return a random basis [D, K] of the same space: no coordinate is much larger than the others, so all are rounded finely."""
    turn = torch.randn(2 * [directions.shape[1]], generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # [K, K]
    return torch.linalg.qr(directions.double() @ turn.to(directions.device)).Q.float()


def _survival(rows: Tensor, directions: Tensor, above: float) -> float:
    """Return the share of the pairs of these rows that a sieve would let through."""
    trial = _from_projected(rows @ directions, above)
    survivors = torch.count_nonzero(multiply(trial.left, trial.right) >= trial.bounds[:, None]).item() - len(rows)
    return survivors / (len(rows) * (len(rows) - 1))


def _slack(width: int) -> float:
    """Return the largest error of a projected and centred unit row.

    It is at most 2^-22 in each of K coordinates, which are rounded to float32 and centred, and a little for lengths and directions
    that are not quite 1.
    """
    return width**0.5 * 2**-22 + 4e-6


def _from_projected(projected: Tensor, above: float) -> Sieve:
    """Return the sieve of projected rows [N, K], which are centred in place."""
    count, width = projected.shape  # [N, K]
    projected -= projected.mean(0)
    largest, longest = projected.abs().max().item(), torch.linalg.vector_norm(projected, dim=1).max().item()
    # |q| stays below 2,900, so that float32 holds every product exactly on devices without int8 products.
    scale = max(largest / 127, longest / 2800, 1e-4)
    q = torch.zeros(-(-count // 32) * 32, width, dtype=torch.int8, device=projected.device)  # [N', K]
    error = 0.0
    for start in range(0, count, CHUNK):
        part = projected[start : start + CHUNK] / scale
        rounded = part.round()
        q[start : start + len(part)] = rounded.clamp_(-127, 127)
        error = max(error, torch.linalg.vector_norm(part - rounded, dim=1).max().item() * scale)
    # 1e-5: the error of a cosine of the full comparison, which is in float32, too.
    radius = max(2 - 2 * above + 1e-5, 0) ** 0.5 + 2 * (error * (1 + 1e-5) + _slack(width))
    return _with_squares(q, int((radius / scale) ** 2) + 1, count)


def _with_squares(q: Tensor, most: int, count: int) -> Sieve:
    """Return the sieve of the pairs with |q(x) - q(y)|^2 <= most.

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
    columns += [torch.zeros_like(low)] * (-(q.shape[1] + len(columns)) % 8)  # CUDA multiplies whole 8s of columns only
    weights = torch.tensor([-1] + [-127] * (len(columns) - 1), dtype=torch.int8, device=q.device).expand(len(q), -1)
    bounds = -torch.div(most - squares, 2, rounding_mode="floor") + least
    bounds[count:] = torch.iinfo(torch.int32).max
    dtype = _fastest(q.device)
    left, right = torch.cat([q, weights], 1), torch.cat([q, torch.stack(columns, 1).to(torch.int8)], 1)  # [N', W]
    return Sieve(left.to(dtype), right.to(dtype), bounds.to(dtype if dtype.is_floating_point else torch.int32), count)


@lru_cache
def _fastest(device: torch.device) -> torch.dtype:
    """Return int8 if the processor multiplies it fast, else float32."""
    if device.type != "cpu":
        return torch.int8 if device.type == "cuda" else torch.float32
    seconds: dict[torch.dtype, list[float]] = {torch.int8: [], torch.float32: []}
    for dtype in [*seconds] * 8:
        ones = torch.ones(512, 64, dtype=dtype)
        start = time.thread_time()  # other processes do not count
        multiply(ones, ones)
        seconds[dtype].append(time.thread_time() - start)
    return min(seconds, key=lambda dtype: min(seconds[dtype]))
