"""What a run writes to a feature store: names to the index, rows to the shards of each encoder, the list of failures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from encoders.runs import remove_unfinished, write_text, write_whole
from encoders.store.files import (
    FAILURES,
    INDEX_SCHEMA,
    next_number,
    numbered,
    read_index,
    read_shard,
    shard_keys,
    unpack_keys,
    write_shard,
)

# Shapes: n = rows of a shard, T = patch tokens of an image.


class Entry(NamedTuple):
    """One row of the index: a name and the content found under it."""

    name: str
    key: str
    bytes: int | None
    mtime_ns: int | None
    width: int
    height: int


class ImageIndex:
    """The names in a store. Entries are appended; of several of one name the last holds."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._number = next_number(numbered(store, "images", ".parquet"))
        self._new: list[Entry] = []
        table = read_index(store)
        columns = [table[name].to_pylist() for name in Entry._fields]
        self._entries = {row[0]: Entry(*row) for row in zip(*columns, strict=True)}
        self._sizes = {entry.key: (entry.width, entry.height) for entry in self._entries.values()}

    def key_of(self, name: str, size: int, mtime_ns: int) -> str | None:
        """The content key of a file that has not changed since it was seen."""
        entry = self._entries.get(name)
        return entry.key if entry is not None and (entry.bytes, entry.mtime_ns) == (size, mtime_ns) else None

    def add(self, name: str, key: str, stat: tuple[int, int] | None, image_size: tuple[int, int] | None) -> None:
        """Take in a name; `image_size` (width, height) may be missing for a content that is known."""
        width, height = self._sizes.setdefault(key, image_size or (0, 0))
        size, mtime_ns = stat or (None, None)
        entry = Entry(name, key, size, mtime_ns, width, height)
        if self._entries.get(name) != entry:
            self._entries[name] = entry
            self._new.append(entry)

    def commit(self) -> None:
        """Write what was added."""
        if not self._new:
            return
        columns = dict(zip(Entry._fields, map(list, zip(*self._new, strict=True)), strict=True))
        table = pa.table(columns, schema=INDEX_SCHEMA)
        write_whole(self.store / f"images-{self._number:05d}.parquet", lambda path: pq.write_table(table, path))
        self._number, self._new = self._number + 1, []


@dataclass
class Errors:
    """Relative errors of int8 tokens: what a running mean and a maximum need."""

    total: float = 0.0
    count: int = 0
    largest: float = 0.0

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.total + other.total, self.count + other.count, max(self.largest, other.largest))

    def summary(self) -> dict[str, float]:
        """Their mean and maximum."""
        return {"mean": self.total / max(self.count, 1), "max": self.largest}


class ShardWriter:
    """The features of one encoder.

    Attributes:
        claimed: keys of the images that are encoded, or about to be in this run.
        pending: bytes that wait to be written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        self.folder, self.name = folder, name
        files = numbered(folder, "features", ".safetensors")
        self._number = next_number(files)
        self.claimed = {key for file in files for key in unpack_keys(shard_keys(file))}
        self._keys: list[str] = []
        self._rows: list[dict[str, Tensor]] = []
        self.pending = 0

    def __len__(self) -> int:
        """Rows that wait to be written."""
        return len(self._keys)

    def add(self, keys: list[str], features: dict[str, Tensor]) -> None:
        """Features [B, ...] by kind of the images with these keys."""
        self._keys += keys
        self._rows.append(features)
        self.pending += sum(value.nbytes for value in features.values())

    def commit(self) -> None:
        """Write a shard of what was added. ValueError when something in it is not finite."""
        if not self._keys:
            return
        shard = {kind: torch.cat([rows[kind] for rows in self._rows]) for kind in self._rows[0]}  # [n, ...]
        metadata = {}
        if "errors" in shard:
            errors = shard.pop("errors").double()  # [n, T]
            metadata["errors"] = json.dumps([float(errors.sum()), errors.numel(), float(errors.max())])
        for kind, values in shard.items():
            if values.is_floating_point() and not torch.isfinite(values).all():
                hint = "; values above 65504 do not fit float16: store them as bfloat16 or int8" if values.dtype == torch.float16 else ""
                raise ValueError(f"{self.name} gives {kind} that are not finite{hint}")
        write_shard(self.folder / f"features-{self._number:05d}.safetensors", self._keys, shard, metadata)
        self._number, self._keys, self._rows, self.pending = self._number + 1, [], [], 0

    def errors(self) -> Errors:
        """Of all int8 tokens that are written."""
        found = [read_shard(file)[1].get("errors") for file in numbered(self.folder, "features", ".safetensors")]
        return sum((Errors(*json.loads(text)) for text in found if text), Errors())


def write_failures(store: Path, reasons: Mapping[str, str]) -> None:
    """The images that a run could not read, by name, with the reasons; in place of those of the run before."""
    lines = [json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in reasons.items()]
    write_text(store / FAILURES, "".join(lines))
