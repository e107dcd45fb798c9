"""CLIP-blind pairs: images that CLIP takes for the same and DINOv2 does not (arXiv 2401.06209, section 2).

All pairs are compared, exactly: a narrow matrix product that can only overestimate CLIP's cosine throws nearly all of them out,
and what is left is computed in full.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

# Shapes: N images, D width of an embedding, K width after contraction, M pairs.

ROUNDING = 1e-5
"""How much less than the threshold a float32 product may be and still be looked at in full."""
WIDTHS = (32, 64, 128, 256)
"""Widths that the contraction chooses from, besides no contraction."""


@dataclass(frozen=True)
class BlindPairs:
    """M pairs of images, by gap (CLIP's cosine less DINOv2's), largest first; equal gaps by i, then j."""

    i: NDArray[np.int64]
    """[M], index of the one image"""
    j: NDArray[np.int64]
    """[M], index of the other; i < j"""
    clip_similarity: NDArray[np.float32]
    """[M], cosine"""
    dino_similarity: NDArray[np.float32]
    """[M], cosine"""
    images: int
    """N, how many were compared"""

    def __len__(self) -> int:
        return len(self.i)

    @property
    def gap(self) -> NDArray[np.float32]:
        """[M], what the pairs are sorted by"""
        return self.clip_similarity - self.dino_similarity

    def summary(self) -> str:
        """One line: how many pairs of how many, and how wide the gap is."""
        possible = self.images * (self.images - 1) // 2
        found = f"{len(self):,} blind pairs among {self.images:,} images ({possible:,} pairs)"
        return f"{found}; gap {self.gap.min():.3f} to {self.gap.max():.3f}" if len(self) else found

    def to_parquet(self, path: str | Path) -> None:
        """Columns i, j, clip_similarity, dino_similarity."""
        pq.write_table(pa.table(self._columns()), path)

    def to_csv(self, path: str | Path) -> None:
        """The same columns, with a header."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self._columns())
            writer.writerows(zip(*(column.tolist() for column in self._columns().values()), strict=True))

    def _columns(self) -> dict[str, NDArray[Any]]:
        return {"i": self.i, "j": self.j, "clip_similarity": self.clip_similarity, "dino_similarity": self.dino_similarity}


def blind_pairs(
    clip: Any,
    dino: Any,
    clip_above: float = 0.95,
    dino_below: float = 0.6,
    *,
    device: str | torch.device = "cpu",
    tile: int = 2048,
    progress: bool = False,
) -> BlindPairs:
    """All pairs of images with CLIP cosine > `clip_above` and DINOv2 cosine < `dino_below`.

    The same pairs as a brute-force search in float32; only those within 2e-6 of a threshold may fall on either side.

    Args:
        clip: embeddings [N, D] of one encoder: an array, a memory map or a tensor. Rows that are not of unit length are
            normalised, with a warning; a row of zeros has cosine 0 with everything.
        dino: embeddings [N, any width] of the other encoder, of the same images in the same order.
        clip_above, dino_below: the defaults are the paper's.
        device: where the products are computed.
        tile: rows compared at a time. Memory is O(N D + tile^2) besides the result.
        progress: show a bar.

    Raises:
        ValueError: for arrays that are not two-dimensional, differ in length, or hold NaN or infinity; for thresholds that are NaN.
    """
    if np.isnan(clip_above) or np.isnan(dino_below):
        raise ValueError(f"thresholds must be numbers, got clip_above={clip_above}, dino_below={dino_below}")
    a, b = unit_rows(clip, "clip").to(device), unit_rows(dino, "dino").to(device)  # [N, D], [N, D']
    if len(a) != len(b):
        raise ValueError(f"clip has {len(a)} rows, dino {len(b)}: both must be of the same images, in the same order")
    found = [torch.empty(0, 4, dtype=torch.float64)]
    with _full_precision():
        narrow = contract(a, clip_above)  # [N, K]
        for rows, columns in track(tiles(len(a), tile), "comparing", disable=not progress):
            close = (narrow[rows] @ narrow[columns].T > clip_above - ROUNDING).nonzero()  # [S, 2]
            i, j = close[:, 0] + rows.start, close[:, 1] + columns.start
            upper = i < j
            for some in zip(i[upper].split(16 * tile), j[upper].split(16 * tile), strict=True):
                found.append(_in_full(a, b, *some, clip_above, dino_below).cpu())
    i, j, clip_similarity, dino_similarity = torch.cat(found).numpy().T
    order = np.lexsort((j, i, dino_similarity - clip_similarity))
    pairs = (i[order].astype(np.int64), j[order].astype(np.int64))
    return BlindPairs(*pairs, clip_similarity[order].astype(np.float32), dino_similarity[order].astype(np.float32), images=len(a))


@contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products in true float32, whatever the program around allows (TF32 errs by far more than ROUNDING)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def unit_rows(embeddings: Any, name: str) -> Tensor:
    """[N, D] float32 with rows of length 1, or 0 for a row of zeros."""
    x = embeddings if isinstance(embeddings, Tensor) else torch.tensor(np.asarray(embeddings, dtype=np.float32))
    x = x.detach().float()
    if x.ndim != 2:
        raise ValueError(f"{name} must be embeddings of shape [N, D], got {list(x.shape)}")
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)  # [N, 1]
    if not lengths.isfinite().all():
        bad = (~lengths[:, 0].isfinite()).nonzero()[:, 0].tolist()
        raise ValueError(f"{name} has NaN or infinity in {len(bad)} of {len(x)} rows, the first is row {bad[0]}")
    if ((lengths - 1).abs() > 1e-3).any():
        warnings.warn(f"{name}: rows are not of unit length; they are normalised", stacklevel=3)
    return (x / torch.where(lengths > 0, lengths, 1)).float()


def contract(x: Tensor, above: float, sample: int = 2048) -> Tensor:
    """Fewer columns whose products are never smaller: for rows of `x` [N, D] gives [N, K] with x'y' >= xy.

    K - 1 principal directions and the length of the rest; by Cauchy-Schwarz the rests multiply to at most the product of their
    lengths. K is what costs least, judged by a sample of the pairs; where too many would be left to compute, it is D: `x` itself.
    """
    if len(x) < sample or x.shape[1] <= WIDTHS[0]:
        return x
    some = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:sample].to(x.device)]  # [sample, D]
    directions = torch.linalg.eigh((some.T @ some).double()).eigenvectors.flip(1).float()  # [D, D], largest first
    best, least = x.shape[1], float(x.shape[1])
    for width in (w for w in WIDTHS if w < x.shape[1]):
        narrow = _narrow(some, directions, width)
        left = ((narrow @ narrow.T).triu(1) > above - ROUNDING).float().sum().item() / (sample * (sample - 1) / 2)
        cost = width + 64 * left * x.shape[1]  # a product out of order costs about 64 times one in a matrix product
        if cost < least:
            best, least = width, cost
    return x if best == x.shape[1] else torch.cat([_narrow(part, directions, best) for part in x.split(1 << 16)])


def _narrow(x: Tensor, directions: Tensor, width: int) -> Tensor:
    principal = directions[:, : width - 1]  # [D, K-1]
    kept = x @ principal  # [N, K-1]
    rest = torch.linalg.vector_norm(x - kept @ principal.T, dim=1)  # [N]; not from lengths, whose difference loses all digits
    return torch.cat([kept, rest[:, None]], dim=1)  # [N, K]


def tiles(count: int, size: int) -> list[tuple[slice, slice]]:
    """The squares of a `count` x `count` matrix on and above its diagonal, as rows and columns."""
    starts = range(0, count, size)
    return [(slice(r, min(r + size, count)), slice(c, min(c + size, count))) for r in starts for c in starts if c >= r]


def _in_full(a: Tensor, b: Tensor, i: Tensor, j: Tensor, clip_above: float, dino_below: float) -> Tensor:
    """Those of the pairs (i, j) that are blind, as rows of i, j and both cosines, [M, 4] float64."""
    clip = (a[i] * a[j]).sum(1, dtype=torch.float64)  # [S]
    near = clip > clip_above
    i, j, clip = i[near], j[near], clip[near]
    dino = (b[i] * b[j]).sum(1, dtype=torch.float64)
    far = dino < dino_below
    return torch.stack([i[far].double(), j[far].double(), clip[far], dino[far]], dim=1)


__all__ = ["BlindPairs", "blind_pairs"]
