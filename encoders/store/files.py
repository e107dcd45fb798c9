"""The files of a feature store are an index of images, shards of features for each encoder, and a list of failures.

    manifest.json                              the description of each encoder's features
    images-00000.parquet, ...                  name, content key, size, time, width, height: one row per name
    <encoder>/features-00000.safetensors, ...  content keys, embeddings, tokens, scales: one row per content

Every file is written whole under a temporary name and then renamed. No file but the manifest is ever changed. An image
counts as encoded when its key is in a shard; the index, written before, may be ahead of the shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from encoders.runs import remove_unfinished, write_text, write_whole

# Shapes: n = rows of a shard, B = images of a batch, T = patch tokens of an image, D = their width.

FAILURES = "failures.jsonl"
INDEX_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "key": pa.string(),
        "bytes": pa.int64(),  # null for members of tars
        "mtime_ns": pa.int64(),  # null for members of tars
        "width": pa.int32(),
        "height": pa.int32(),
    }
)
KEY_TYPE = np.dtype("S16")  # a content key as bytes; all have the full length, so that S's ignored zeros at the end do no harm

TokenFormat = Literal["float16", "bfloat16", "int8"]
TOKEN_FORMATS: tuple[TokenFormat, ...] = ("float16", "bfloat16", "int8")
"""Patch tokens are stored in one of these formats; int8 has a scale for each token."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def numbered(folder: Path, stem: str, suffix: str) -> list[Path]:
    """Return the complete files "stem-00000.suffix", in order."""
    return sorted(folder.glob(f"{stem}-*{suffix}"), key=lambda path: int(path.stem.rpartition("-")[2]))


def next_number(files: list[Path]) -> int:
    return int(files[-1].stem.rpartition("-")[2]) + 1 if files else 0


def read_index(store: Path) -> pa.Table:
    """Return all rows of the index, in the order in which they were written."""
    parts = [pq.read_table(part, schema=INDEX_SCHEMA) for part in numbered(store, "images", ".parquet")]
    return pa.concat_tables(parts) if parts else INDEX_SCHEMA.empty_table()


def pack_keys(keys: list[str]) -> NDArray[np.bytes_]:
    """Content keys in hexadecimal -> [n] of KEY_TYPE."""
    return np.frombuffer(bytes.fromhex("".join(keys)), dtype=KEY_TYPE)  # [n]


def unpack_keys(keys: NDArray[np.bytes_]) -> list[str]:
    """[n] of KEY_TYPE -> content keys in hexadecimal."""
    digits = np.ascontiguousarray(keys).tobytes().hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]


def write_shard(path: Path, keys: list[str], features: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write rows of features [n, ...] by name, with their n content keys."""
    packed = torch.from_numpy(pack_keys(keys).view(np.uint8).reshape(-1, KEY_TYPE.itemsize).copy())  # [n, 16]
    write_whole(path, lambda temporary: temporary.write_bytes(save({"keys": packed, **features}, metadata)))


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors [n, ...] of a shard and its metadata. They are memory-mapped: nothing is read before it is looked at."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run `mof encode` again, which encodes its images anew") from error


def shard_keys(path: Path) -> NDArray[np.bytes_]:
    """Return the content keys [n] of a shard, of KEY_TYPE."""
    return read_shard(path)[0]["keys"].numpy().reshape(-1).view(KEY_TYPE).copy()  # [n, 16] uint8 -> [n]


class Entry(NamedTuple):
    """A row of the index: a name, its content key and facts about the file."""

    name: str
    key: str
    bytes: int | None
    mtime_ns: int | None
    width: int
    height: int


class ImageIndex:
    """The names in a store. Entries are appended; the last entry of a name is valid."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._number = next_number(numbered(store, "images", ".parquet"))
        self._new: list[Entry] = []
        table = read_index(store)
        columns = [table[name].to_pylist() for name in Entry._fields]
        self._entries = {row[0]: Entry(*row) for row in zip(*columns, strict=True)}
        self._sizes = {entry.key: (entry.width, entry.height) for entry in self._entries.values()}

    def key_of(self, name: str, size: int, mtime_ns: int) -> str | None:
        """Return the content key of a file that has not changed since it was seen, else None."""
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
        """Write the new entries."""
        if not self._new:
            return
        columns = dict(zip(Entry._fields, map(list, zip(*self._new, strict=True)), strict=True))
        table = pa.table(columns, schema=INDEX_SCHEMA)
        write_whole(self.store / f"images-{self._number:05d}.parquet", lambda path: pq.write_table(table, path))
        self._number, self._new = self._number + 1, []


@dataclass
class Errors:
    """The sum, number and maximum of the relative errors of int8 tokens."""

    total: float = 0.0
    count: int = 0
    largest: float = 0.0

    def __add__(self, more: Errors) -> Errors:
        return Errors(self.total + more.total, self.count + more.count, max(self.largest, more.largest))

    def summary(self) -> dict[str, float]:
        """Return their mean and maximum."""
        return {"mean": self.total / max(self.count, 1), "max": self.largest}


class ShardWriter:
    """The features of one encoder.

    Attributes:
        claimed: keys of the images that are encoded, or about to be in this run.
        pending: bytes that wait to be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        self.folder = folder
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
        """Write the new rows as a shard."""
        if not self._keys:
            return
        shard = {kind: torch.cat([rows[kind] for rows in self._rows]) for kind in self._rows[0]}  # [n, ...]
        metadata = {}
        if "errors" in shard:
            errors = shard.pop("errors").double()  # [n, T]
            metadata["errors"] = json.dumps([float(errors.sum()), errors.numel(), float(errors.max())])
        write_shard(self.folder / f"features-{self._number:05d}.safetensors", self._keys, shard, metadata)
        self._number, self._keys, self._rows, self.pending = self._number + 1, [], [], 0

    def errors(self) -> Errors:
        """Return the errors of all int8 tokens that are written."""
        texts = [read_shard(file)[1].get("errors") for file in numbered(self.folder, "features", ".safetensors")]
        return sum((Errors(*json.loads(text)) for text in texts if text), Errors())


def write_failures(store: Path, reasons: Mapping[str, str]) -> None:
    """Write the images that a run could not read, by name, with the reasons, in place of the list of the run before."""
    lines = [json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in reasons.items()]
    write_text(store / FAILURES, "".join(lines))


def pack(tokens: Tensor, form: TokenFormat) -> dict[str, Tensor]:
    """tokens [B, T, D] -> "tokens" [B, T, D] in `form`; for int8 also "scales" and "errors" [B, T], float32.

    int8 is round(token / scale) with scale = its largest magnitude / 127, so no value moves by more than half a scale. The error
    is measured per token: |what `unpack` gives - token| / |token|, in Euclidean norm.
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
    """Return packed tokens [..., D], with scales [...] for int8, as [..., D]: float32 for int8, else as stored."""
    return tokens if scales is None else tokens.float() * scales[..., None]
