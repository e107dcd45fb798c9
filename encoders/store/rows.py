"""Rows reads the features of an encoder from all shards, like a single table with the rows of a view."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from encoders.digests import DamagedError
from encoders.store.shards import AGAIN, Shard
from encoders.whole_files import write_whole

# Shapes: N = rows of the view, n = rows that are read, E = width of an embedding.

logger = logging.getLogger(__name__)


class Rows:
    """Rows holds the N rows of a view. Each row that is read is compared with its digest.

    Args:
        files: the shards.
        keys: the content keys of each shard.
        order: [N] content keys of the rows.
        names: [N] names of the images, for messages.
    """

    def __init__(self, files: list[Path], keys: list[NDArray[np.bytes_]], order: NDArray[np.bytes_], names: list[str]) -> None:
        self.files, self.names = files, names
        self.shards: dict[int, Shard] = {}  # opened on first use
        self.sound: NDArray[np.float32] | None = None  # all embeddings, once they were read
        shard = np.repeat(np.arange(len(files)), [len(part) for part in keys])
        within = np.concatenate([np.arange(len(part)) for part in keys])
        unique, first = np.unique(np.concatenate(keys), return_index=True)
        place = first[np.searchsorted(unique, order)]  # [N]
        self.shard, self.within = shard[place], within[place]  # [N], [N]
        folder = files[0].parent
        self.joined = folder.with_name(f"{folder.name}-{xxhash.xxh3_64_hexdigest(order.tobytes())}.npy")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shards": {}, "sound": None}

    def gather(self, kind: str, rows: NDArray[np.int64]) -> Tensor:
        """Return the features [n, ...] of this kind for the rows [n]."""
        parts = self._parts(rows)
        first = self._open(parts[0][0] if parts else 0).features[kind]
        gathered = torch.empty(len(rows), *first.shape[1:], dtype=first.dtype)
        for number, here in parts:
            gathered[torch.from_numpy(here)] = self._read(kind, number, rows[here])
        return gathered

    def embeddings(self) -> NDArray[np.float32]:
        """Return all embeddings [N, E], memory-mapped if a file holds them in a single piece."""
        if self.sound is None:
            self.sound = self._whole_shard()
        if self.sound is None:
            self.sound = self._joined() if self.joined.is_file() else self.gather("embeddings", np.arange(len(self.shard))).numpy()
        return self.sound

    def join(self) -> None:
        """Write the embeddings [N, E] in a single piece, unless a shard or an undamaged file already holds them in a single piece."""
        try:
            if self._whole_shard() is not None or (self.joined.is_file() and self._joined() is not None):
                return
        except DamagedError as error:
            logger.warning("%s", error)
        width = self._open(0).features["embeddings"].shape[1]

        def write(temporary: Path) -> None:
            target = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(self.shard), width))
            for number, here in self._parts(np.arange(len(self.shard))):
                target[here] = self._read("embeddings", number, here).numpy()
            target.flush()

        write_whole(self.joined, write)

    def _whole_shard(self) -> NDArray[np.float32] | None:
        """Return the embeddings if a single shard holds exactly these rows in this order, or None."""
        if (self.shard != self.shard[0]).any() or len(self.shard) != len(self._open(int(self.shard[0])).keys):
            return None
        if (np.diff(self.within) != 1).any():
            return None
        number, every = int(self.shard[0]), np.arange(len(self.shard))
        mapped = self._open(number).features["embeddings"]
        self._refuse_damaged("embeddings", number, every, mapped, self.files[number])
        return mapped.numpy()

    def _joined(self) -> NDArray[np.float32]:
        try:
            mapped = np.load(self.joined, mmap_mode="c")  # [N, E]; "c", because torch wants a writable array, though nobody writes
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{self.joined} is damaged ({error}): {AGAIN}") from error
        width = self._open(0).features["embeddings"].shape[1]
        if mapped.shape != (len(self.shard), width) or mapped.dtype != np.float32:
            raise DamagedError(f"{self.joined} is damaged, it holds {list(mapped.shape)} of {mapped.dtype}: {AGAIN}")
        for number, here in self._parts(np.arange(len(self.shard))):
            self._refuse_damaged("embeddings", number, here, torch.from_numpy(mapped[here]), self.joined)
        return mapped

    def _read(self, kind: str, number: int, rows: NDArray[np.int64]) -> Tensor:
        """Return the features [n, ...] of rows [n] that are all in this shard."""
        part = self._open(number).features[kind][torch.from_numpy(self.within[rows])]
        self._refuse_damaged(kind, number, rows, part, self.files[number])
        return part

    def _refuse_damaged(self, kind: str, number: int, rows: NDArray[np.int64], part: Tensor, file: Path) -> None:
        bad = self._open(number).damaged(kind, part, self.within[rows])
        if len(bad):
            raise DamagedError(f"{file} is damaged, in {kind} of {self.names[rows[bad[0]]]} and {len(bad) - 1} more images: {AGAIN}")

    def _parts(self, rows: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """Return pairs (shard, positions in `rows` of the rows that this shard holds)."""
        by_shard = np.argsort(self.shard[rows], kind="stable")  # [n]
        present, starts = np.unique(self.shard[rows][by_shard], return_index=True)
        return list(zip(present.tolist(), np.split(by_shard, starts[1:]), strict=False))  # without rows, zip drops the empty part

    def _open(self, number: int) -> Shard:
        if number not in self.shards:
            self.shards[number] = Shard(self.files[number])
        return self.shards[number]
