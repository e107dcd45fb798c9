"""EmbeddingRows reads the embeddings of an encoder in slices. They are checked once, and rows have unit length wherever they are read."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from copy import copy
from mmap import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mof.pairs.core_threads import on_each_core

# Shapes: N images, D width of an embedding, S selected images, M pairs.

CHUNK = 4096
"""Rows read at a time."""
SHORTEST = 1e-30
"""A shorter row counts as zeros: float32 cannot tell its direction."""


class EmbeddingRows:
    """EmbeddingRows holds N rows of width D, taken as float32. Nothing is copied: rows are normalised when they are read.

    Args:
        source: array, memory map or tensor [N, D]. All but memory maps move to the device.
        name: name of the embeddings, for messages.
        device: where rows are handed out.

    Raises:
        ValueError: for a source that is not two-dimensional, or holds NaN or infinity.
    """

    def __init__(self, source: Any, name: str, device: str | torch.device = "cpu") -> None:
        self.name, self.device = name, torch.device(device)
        whole = isinstance(source, np.memmap) and isinstance(source.base, mmap) and source.flags.c_contiguous
        self._mapped = source if whole and source.filename is not None else None
        self.values = _tensor(source)
        if self.values.ndim != 2:
            raise ValueError(f"{name} must be embeddings of shape [N, D], got {list(self.values.shape)}")
        if not isinstance(source, np.memmap):
            self.values = self.values.to(self.device)
        lengths = torch.cat([torch.empty(0, device=self.device), *self._in_chunks(self._lengths)])  # [N]
        bad = (~lengths.isfinite()).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(f"{name} has NaN or infinity in {len(bad)} of {len(self)} rows, the first is row {bad[0]}")
        off = (lengths - 1).abs().max().item() if len(self) else 0.0
        if off > 1e-3:
            warnings.warn(f"{name}: rows are not of unit length; they are normalised", stacklevel=4)
        # Rows whose length float32 cannot tell from 1 are left as they are.
        self._divisors = None if off < 5e-7 else torch.where(lengths > SHORTEST, lengths, torch.inf)[:, None]  # [N, 1]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which maps a file of embeddings again instead of getting its content."""
        if (mapped := self._mapped) is None:
            return self.__dict__
        place = {"filename": mapped.filename, "dtype": mapped.dtype, "shape": mapped.shape, "offset": mapped.offset}
        return {**self.__dict__, "values": None, "_mapped": None, "place": place, "digest_there": self.digest()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        place, digest = state.pop("place", None), state.pop("digest_there", None)
        self.__dict__.update(state)
        if place is not None:
            self._mapped = np.memmap(mode="c", **place)
            self.values = _tensor(self._mapped)
            if self.digest() != digest:
                raise ValueError(f"{place['filename']} is not the same file on all machines of the cluster, or was changed in memory")

    def moved(self, device: str) -> EmbeddingRows:
        """Return the same rows, handed out on another device. A memory map stays where it is."""
        moved = copy(self)
        moved.device = torch.device(device)
        moved.values = self.values if self._mapped is not None else self.values.to(device)
        moved._divisors = None if self._divisors is None else self._divisors.to(device)
        return moved

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def read(self, rows: slice) -> Tensor:
        """Return the rows of a slice, of unit length or zeros, shape [S, D]."""
        part = self.values[rows].to(self.device).float()
        return part if self._divisors is None else part / self._divisors[rows]

    def take(self, index: Tensor) -> Tensor:
        """Return the rows of an index [S], of unit length or zeros, shape [S, D]."""
        part = self.values.index_select(0, index.to(self.values.device)).to(self.device).float()
        return part if self._divisors is None else part / self._divisors[index.to(self.device)]

    def cosines(self, i: Tensor, j: Tensor) -> Tensor:
        """Return the cosines of the pairs (i, j), shape [M], float32 on the CPU."""
        size = 512 if self.device.type == "cpu" else 1 << 16  # so that the rows stay in the cache
        # A sum, not a matrix product: torch adds in many short partial sums, whose error is about 1e-7.
        parts = [(self.take(a) * self.take(b)).sum(1) for a, b in zip(i.split(size), j.split(size), strict=True)]
        return torch.cat(parts).cpu() if parts else torch.empty(0)

    def project(self, directions: Tensor) -> Tensor:
        """Return the rows times `directions` [D, K], shape [N, K]. The products are in float64, which torch never rounds to TF32."""
        wide = directions.double()  # [D, K]
        parts = self._in_chunks(lambda rows: (self.read(rows).double() @ wide).float())
        return torch.cat([directions.new_empty(0, directions.shape[1]), *parts])

    def digest(self) -> str:
        """Return the SHA-256 of type, shape and every byte."""
        digest = hashlib.sha256(f"{self.values.dtype} {list(self.values.shape)}".encode())
        for start in range(0, len(self), CHUNK):
            digest.update(self.values[start : start + CHUNK].cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _in_chunks(self, work: Callable[[slice], Tensor]) -> Iterator[Tensor]:
        return on_each_core(work, (slice(start, start + CHUNK) for start in range(0, len(self), CHUNK)), self.device)

    def _lengths(self, rows: slice) -> Tensor:
        """Return the lengths of rows, shape [S]. A sum of squares that leaves float32's range is done again in double."""
        part = self.values[rows].to(self.device).float()  # [S, D]
        lengths = torch.linalg.vector_norm(part, dim=1)  # [S]
        again = ~((lengths > 1e-15) & (lengths < 1e15))
        if again.any():
            lengths[again] = torch.linalg.vector_norm(part[again].double(), dim=1).float()
        return lengths


def _tensor(source: Any) -> Tensor:
    if isinstance(source, Tensor):
        return source.detach()
    array = np.asarray(source)
    if array.dtype not in (np.float16, np.float32, np.float64):
        array = array.astype(np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes
        return torch.from_numpy(np.ascontiguousarray(array))
