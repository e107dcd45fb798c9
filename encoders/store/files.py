"""The files of a feature store are an index of images, shards of features for each encoder, and a list of failures.

    manifest.json                              the store's identity, the description of each encoder's features
    images-00000.parquet, ...                  name, content key, size, time, width, height: a row for each name
    view.parquet                               the names whose files the last run found
    <encoder>-<order>.npy                      embeddings in a single piece, in the order of the view; can be deleted
    <encoder>/features-00000.safetensors, ...  content keys, embeddings, tokens, scales: a row for each content

Every file is written whole under a temporary name and then renamed, and holds a digest and the store's identity. An image
counts as encoded when its key is in a shard. The index is written after the shards, so it may lack images of a run that was stopped.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.digests import DamagedError
from encoders.storage import remove
from encoders.tables import read_table, write_table
from encoders.whole_files import write_text

# Shapes: n = keys, B = images of a batch, T = patch tokens of an image, D = width of a patch token.

logger = logging.getLogger(__name__)

FAILURES, VIEW = "failures.jsonl", "view.parquet"
INDEX_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "key": pa.string(),
        "bytes": pa.int64(),  # size of the file; null for members of tars
        "mtime_ns": pa.int64(),  # time of the last change (`file_state`); null for members of tars
        "width": pa.int32(),
        "height": pa.int32(),
    }
)
KEY_TYPE = np.dtype("S16")  # a content key as bytes; numpy ignores zeros at the end of an S, but all keys have the full length

TokenFormat = Literal["float16", "bfloat16", "int8"]
TOKEN_FORMATS: tuple[TokenFormat, ...] = ("float16", "bfloat16", "int8")
"""The formats in which patch tokens can be stored. int8 has a scale for each token."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def numbered(folder: Path, stem: str, suffix: str) -> list[Path]:
    """Return the complete files "stem-00000.suffix", in order. Copies, such as "stem-00000 (copy).suffix", are left out."""
    files = [(path.stem.removeprefix(f"{stem}-"), path) for path in folder.glob(f"{stem}-*{suffix}")]
    return [path for _, path in sorted((int(number), path) for number, path in files if number.isdecimal())]


def next_number(files: list[Path]) -> int:
    return int(files[-1].stem.rpartition("-")[2]) + 1 if files else 0


def read_index(store: Path, run: str | None = None) -> pa.Table:
    """Return all rows of the index, in the order in which they were written.

    Args:
        run: the entry "store" of the store's manifest; None allows any store.

    Raises:
        DamagedError, ForeignError: for a file that was changed, or that belongs to another store; the message names it.
    """
    return pa.concat_tables([INDEX_SCHEMA.empty_table(), *(_read(part, run).cast(INDEX_SCHEMA) for part in index_files(store))])


def index_files(store: Path) -> list[Path]:
    """Return the complete files of the index, in order."""
    return numbered(store, "images", ".parquet")


def _read(path: Path, run: str | None) -> pa.Table:
    try:
        return read_table(path, run=run)
    except DamagedError as error:
        raise DamagedError(f"{error}; the same `mof encode` again writes it anew") from error


def read_view(store: Path, run: str | None = None) -> set[str] | None:
    """Return the names of the files that the last complete run found. None means no complete run, or a store of an earlier release."""
    return set(_read(store / VIEW, run)["name"].to_pylist()) if (store / VIEW).is_file() else None


def write_view(store: Path, names: Iterable[str], run: str) -> None:
    """Write the names of the files that a run found and could read."""
    write_table(store / VIEW, pa.table({"name": pa.array(names, pa.string())}), run)


def file_state(status: os.stat_result) -> tuple[int, int]:
    """Return a file's size and the time of its last change.

    Programs can set the time of the last change of the content (mtime), but not the time of the last change of the metadata (ctime).
    """
    return status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)


def pack_keys(keys: list[str]) -> NDArray[np.bytes_]:
    """Convert content keys in hexadecimal to an array [n] of KEY_TYPE."""
    return np.frombuffer(bytes.fromhex("".join(keys)), dtype=KEY_TYPE)  # [n]


def unpack_keys(keys: NDArray[np.bytes_]) -> list[str]:
    """Convert an array [n] of KEY_TYPE to content keys in hexadecimal."""
    digits = np.ascontiguousarray(keys).tobytes().hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]


class Entry(NamedTuple):
    """An entry is a row of the index: a name, its content key and facts about the file."""

    name: str
    key: str
    bytes: int | None
    mtime_ns: int | None
    width: int
    height: int


class ImageIndex:
    """ImageIndex holds the names in a store. Entries are appended, and the last entry of a name is valid. Damaged files are deleted first.

    Args:
        run: the entry "store" of the store's manifest.

    Raises:
        ForeignError: for a file of another store.
    """

    def __init__(self, store: Path, run: str) -> None:
        self.store, self.run = store, run
        self._number = next_number(index_files(store))
        for file in (*index_files(store), *store.glob(VIEW)):
            try:
                _read(file, run)
            except DamagedError as error:
                logger.warning("%s", error)
                remove(file)
        self._new: list[Entry] = []
        table = read_index(store)
        columns = [table[name].to_pylist() for name in Entry._fields]
        self._entries = {row[0]: Entry(*row) for row in zip(*columns, strict=True)}
        self._sizes = {entry.key: (entry.width, entry.height) for entry in self._entries.values()}

    def key_of(self, name: str, size: int, mtime_ns: int) -> str | None:
        """Return the content key of a file that has not changed since it was seen, or None for another file."""
        entry = self._entries.get(name)
        return entry.key if entry is not None and (entry.bytes, entry.mtime_ns) == (size, mtime_ns) else None

    def names(self) -> set[str]:
        """Return all names that the store has ever seen."""
        return set(self._entries)

    def keys(self, names: Iterable[str]) -> set[str]:
        """Return the content keys of these names."""
        return {self._entries[name].key for name in names}

    def knows(self, key: str) -> bool:
        """Return whether the size of the image with this content key is known."""
        return key in self._sizes

    def add(self, name: str, key: str, stat: tuple[int, int] | None, image_size: tuple[int, int] | None) -> None:
        """Add an entry for a name. `image_size` (width, height) may be None for a content that is known."""
        width, height = self._sizes.setdefault(key, image_size or (0, 0))
        size, mtime_ns = stat or (None, None)
        entry = Entry(name, key, size, mtime_ns, width, height)
        if self._entries.get(name) != entry:
            self._entries[name] = entry
            self._new.append(entry)

    @property
    def uncommitted(self) -> int:
        """Return the number of new entries that are not on disk yet."""
        return len(self._new)

    def commit(self) -> None:
        """Write the new entries as a file of the index."""
        if not self._new:
            return
        columns = dict(zip(Entry._fields, map(list, zip(*self._new, strict=True)), strict=True))
        write_table(self.store / f"images-{self._number:05d}.parquet", pa.table(columns, schema=INDEX_SCHEMA), self.run)
        self._number, self._new = self._number + 1, []


def write_failures(store: Path, reasons: Mapping[str, str]) -> None:
    """Write the names of the images that a run could not read, with the reasons. The list of the run before is replaced."""
    lines = [json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in reasons.items()]
    write_text(store / FAILURES, "".join(lines))


def pack(tokens: Tensor, form: TokenFormat) -> dict[str, Tensor]:
    """Return the tokens [B, T, D] in a format: "tokens" [B, T, D], and for int8 also "scales" and "errors" [B, T] in float32.

    int8 is round(token / scale) with scale = largest magnitude in the token / 127, so no value changes by more than half a scale. The
    error of a token is |unpacked token - token| / |token|, in Euclidean norm.
    """
    if form != "int8":
        return {"tokens": tokens.to(DTYPES[form])}
    tokens = tokens.float()
    scales = tokens.abs().amax(dim=-1) / 127  # [B, T]
    rounded = torch.where(scales[..., None] > 0, tokens / scales[..., None], 0).round()  # [B, T, D]
    packed = rounded.clamp(-127, 127).to(torch.int8)
    lengths = tokens.norm(dim=-1)  # [B, T]
    errors = (unpack(packed, scales) - tokens).norm(dim=-1) / lengths.clamp_min(torch.finfo(torch.float32).tiny)  # [B, T]
    return {"tokens": packed, "scales": scales, "errors": errors}


def unpack(tokens: Tensor, scales: Tensor | None) -> Tensor:
    """Return packed tokens as [..., D]: float32 for int8 tokens [..., D] with scales [...], else the tokens as stored."""
    return tokens if scales is None else tokens.float() * scales[..., None]
