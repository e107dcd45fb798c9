"""The files of a feature store: an index of images, and shards of features for each encoder.

    manifest.json                              what is stored, per encoder (`store_manifest`)
    images-00000.parquet, ...                  name, content key, size, time, width, height: one row per name
    <encoder>/features-00000.safetensors, ...  content keys, embeddings, tokens, scales: one row per content

Every file is written whole under a temporary name and then renamed, and no file is ever changed but the manifest. An image
counts as encoded when its key is in a shard; the index, written before, may be ahead of the shards.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from encoders.runs import write_whole

# Shapes: n = rows of a shard.

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


def numbered(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The complete files "stem-00000.suffix", in order."""
    return sorted(folder.glob(f"{stem}-*{suffix}"), key=lambda path: int(path.stem.rpartition("-")[2]))


def next_number(files: list[Path]) -> int:
    return int(files[-1].stem.rpartition("-")[2]) + 1 if files else 0


def read_index(store: Path) -> pa.Table:
    """All rows of the index, in the order they were written."""
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
    """Rows of features [n, ...] by name, with the n content keys they belong to."""
    packed = torch.from_numpy(pack_keys(keys).view(np.uint8).reshape(-1, KEY_TYPE.itemsize).copy())  # [n, 16]
    write_whole(path, lambda temporary: temporary.write_bytes(save({"keys": packed, **features}, metadata)))


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Its tensors [n, ...], memory-mapped: nothing is read before it is looked at. And its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run `mof encode` again, which encodes its images anew") from error


def shard_keys(path: Path) -> NDArray[np.bytes_]:
    """[n] of KEY_TYPE."""
    return read_shard(path)[0]["keys"].numpy().reshape(-1).view(KEY_TYPE).copy()  # [n, 16] uint8 -> [n]
