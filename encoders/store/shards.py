"""Shards hold an encoder's features, a row for each content. Each row has a digest, so that a row can be checked without reading others.

The digests are in the header. The digest of a row is XXH3 with the beginning of the image's content key as seed, so that a row belongs to
its image only. A digest over the header and the keys is checked when a shard is opened.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from encoders.digests import DamagedError, checks
from encoders.storage import remove
from encoders.store.files import KEY_TYPE, pack_keys, unpack_keys
from encoders.tables import refuse_foreign
from encoders.whole_files import write_bytes

# Shapes: n = rows of a shard, m = rows that are checked, B = images of a batch.

logger = logging.getLogger(__name__)

DIGEST = "digest"  # metadata: the digest of the header and the keys
ROWS = "rows of "  # metadata, followed by the name of a kind: the digests of its rows
AGAIN = "the same `mof encode` again encodes its images anew"


class Shard:
    """A shard holds the rows of a file. They are memory-mapped, so a feature is read only when it is used.

    Attributes:
        keys: [n] content keys, of KEY_TYPE.
        features: kind -> features [n, ...].
        metadata: name -> text, as it was written.

    Raises:
        DamagedError: for a file that cannot be read, or whose header or keys were changed.
        ForeignError: for a file of another run.
    """

    def __init__(self, path: Path, run: str | None = None) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.features: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self.metadata: dict[str, str] = file.metadata() or {}
            self.keys = self.features.pop("keys").numpy().reshape(-1).view(KEY_TYPE).copy()  # [n, 16] uint8 -> [n]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DamagedError(f"{path} is damaged ({error}): {AGAIN}") from error
        if not set(self.metadata) <= {"errors"} and checks():  # earlier releases wrote no digests
            if self.metadata.get(DIGEST) != _header_digest(self.keys, self.features, self.metadata):
                raise DamagedError(f"{path} is damaged, its header or its keys were changed: {AGAIN}")
            refuse_foreign(path, self.metadata["run"], self.metadata["file"], run)

    def damaged(self, kind: str, rows: Tensor, within: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of damaged rows in `rows` [m, ...], which were read at the places `within` [m] of the shard."""
        if ROWS + kind not in self.metadata or not checks():
            return np.empty(0, np.int64)
        digests = np.frombuffer(bytes.fromhex(self.metadata[ROWS + kind]), "<u8")  # [n]
        return np.flatnonzero(row_digests(rows, self.keys[within]) != digests[within])

    def check(self) -> None:
        """Read all features, and raise a DamagedError that names the first damaged image."""
        for kind, rows in self.features.items():
            for position in self.damaged(kind, rows, np.arange(len(self.keys)))[:1]:
                key = unpack_keys(self.keys[position : position + 1])[0]
                raise DamagedError(f"{self.path} is damaged, in {kind} of the image with content key {key}: {AGAIN}")


def write_shard(path: Path, keys: list[str], features: dict[str, Tensor], metadata: dict[str, str], run: str) -> None:
    """Write a shard of n rows.

    Args:
        keys: n content keys.
        features: kind -> features [n, ...].
        run: the unique name of the store and the encoder.
    """
    packed = pack_keys(keys)  # [n]
    rows = {ROWS + kind: row_digests(values, packed).astype("<u8").tobytes().hex() for kind, values in features.items()}
    metadata = {**metadata, **rows, "run": run, "file": path.name}
    metadata[DIGEST] = _header_digest(packed, features, metadata)
    tensors = {"keys": torch.from_numpy(packed.view(np.uint8).reshape(-1, KEY_TYPE.itemsize).copy()), **features}  # [n, 16]
    write_bytes(path, _in_order(save(tensors, metadata)))


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in order of their names, which safetensors writes in any order."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def row_digests(rows: Tensor, keys: NDArray[np.bytes_]) -> NDArray[np.uint64]:
    """Return the digests [m] of rows [m, ...] of the images with these keys [m]."""
    if not len(rows):
        return np.empty(0, np.uint64)
    content = rows.reshape(len(rows), -1).contiguous().view(torch.uint8).numpy().reshape(-1).data
    size = len(content) // len(rows)
    seeds = np.ascontiguousarray(keys).view("<u8")[::2].tolist()  # the first half of each key
    parts = (content[start : start + size] for start in range(0, len(content), size))
    return np.fromiter((xxhash.xxh3_64_intdigest(part, seed) for part, seed in zip(parts, seeds, strict=True)), np.uint64, len(rows))


def _header_digest(keys: NDArray[np.bytes_], features: dict[str, Tensor], metadata: dict[str, str]) -> str:
    shapes = {kind: (str(values.dtype), list(values.shape)) for kind, values in features.items()}
    header = [shapes, {name: text for name, text in metadata.items() if name != DIGEST}]
    return xxhash.xxh3_128_hexdigest(json.dumps(header, sort_keys=True).encode() + np.ascontiguousarray(keys).tobytes())


def sound_keys(files: Iterable[Path], run: str) -> set[str]:
    """Return the content keys in the shards of an encoder. A damaged shard is deleted, so that its images count as not encoded.

    Args:
        run: as in `write_shard`.

    Raises:
        ForeignError: for a shard of another store or another encoder.
    """
    keys = set[str]()
    for file in files:
        try:
            shard = Shard(file, run)
            shard.check()
            keys.update(unpack_keys(shard.keys))
        except DamagedError as error:
            logger.warning("%s", error)
            remove(file)
    return keys


def int8_errors(files: Iterable[Path]) -> dict[str, float]:
    """Return the mean and the maximum of the relative errors of all int8 tokens in the shards of an encoder."""
    texts = [Shard(file).metadata.get("errors") for file in files]
    totals = [json.loads(text) for text in texts if text]  # of the sum, the number and the maximum
    return {
        "mean": sum(total for total, _, _ in totals) / max(sum(n for _, n, _ in totals), 1),
        "max": max((m for _, _, m in totals), default=0.0),
    }
