"""At the end of a run, the embeddings of the view are written in a single piece, and rows that are not in the view may be deleted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from encoders.storage import remove
from encoders.store.feature_store import FeatureStore
from encoders.store.files import index_files, next_number, pack_keys, read_index, unpack_keys
from encoders.store.manifest import run_of, shards_of
from encoders.store.shards import Shard, write_shard
from encoders.tables import write_table

# Shapes: n = rows of a shard.


def join_embeddings(store: Path, manifest: Mapping[str, Any], encoders: Iterable[str]) -> None:
    """Write the embeddings of each encoder in a single piece, in the order of the view, and delete the files of earlier views."""
    for name in encoders:
        if manifest["encoders"][name]["embeddings"]:
            joined = FeatureStore(store, [name]).joined(name, write=True)
            for path in store.glob(f"{manifest['encoders'][name]['folder']}-{'?' * 16}.npy"):
                if path != joined:
                    remove(path)


def prune_store(store: Path, manifest: Mapping[str, Any], names: Set[str], keys: Set[str]) -> None:
    """Delete all other names and all other contents. The measured errors of int8 tokens still include the deleted images."""
    for encoder, entry in manifest["encoders"].items():
        for file in shards_of(store, entry):
            _prune_shard(file, keys, run_of(manifest, encoder))
    index = read_index(store)
    files = index_files(store)
    kept = index.filter(pc.is_in(index["name"], pa.array(sorted(names), pa.string())))
    write_table(store / f"images-{next_number(files):05d}.parquet", kept, manifest["store"])
    for file in files:
        remove(file)


def _prune_shard(file: Path, keys: Set[str], run: str) -> None:
    shard = Shard(file)
    kept = np.isin(shard.keys, pack_keys(sorted(keys)))  # [n]
    if not kept.any():
        remove(file)
    elif not kept.all():
        features = {kind: values[torch.from_numpy(kept)] for kind, values in shard.features.items()}
        metadata = {name: text for name, text in shard.metadata.items() if name in ("encoder", "errors")}
        write_shard(file, unpack_keys(shard.keys[kept]), features, metadata, run)
