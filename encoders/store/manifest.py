"""The manifest of a feature store names its encoders, so that no other encoder adds features under their names."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from encoders.base import Encoder
from encoders.digests import DamagedError, file_digest
from encoders.preprocessing import View
from encoders.runs import run_digest, versions
from encoders.store.files import FAILURES, VIEW, TokenFormat, index_files, numbered
from encoders.store.fingerprints import describe, refuse_other
from encoders.tables import run_of as table_run
from encoders.whole_files import read_sealed, write_sealed

MANIFEST, FORMAT = "manifest.json", 1
KINDS = ("embeddings", "tokens", "dtype")
"""Entries of an encoder that say which features are stored."""

logger = logging.getLogger(__name__)


def read_manifest(store: Path) -> dict[str, Any]:
    """Return the manifest. Its entry "store" is the identity of the store, which its files hold; it is "" in stores of earlier releases.

    Raises:
        DamagedError: for a manifest that was changed.
        ValueError: for a folder that is no store, or a store of another format.
    """
    path = store / MANIFEST
    if not path.is_file():
        raise ValueError(f"{store} holds no {MANIFEST}: expected a feature store that `mof encode` wrote")
    try:
        manifest = {"store": "", **read_sealed(path)}
    except ValueError as error:
        raise DamagedError(f"{error}: put back a copy, or encode into another folder") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{store} is of format {manifest.get('format')}, this version reads {FORMAT}: encode again, or update mof-vig")
    encoders = manifest.get("encoders")
    if not isinstance(encoders, dict) or not all(isinstance(entry, dict) for entry in encoders.values()):
        raise ValueError(f"{path} describes no encoders: expected the manifest of a feature store that `mof encode` wrote")
    return manifest


def declare(
    store: Path,
    encoders: Mapping[str, Encoder],
    view: View | None,
    *,
    embeddings: bool,
    tokens: TokenFormat | None,
    dtype: torch.dtype | None,
    sources: Sequence[str] = (),
) -> dict[str, Any]:
    """Add the encoders to the store's manifest, and return the manifest, which now says that the run is not complete.

    Args:
        sources: the images' sources. A new store gets its identity from them and its first encoders, so that the same run writes the same
            bytes anywhere.

    Raises:
        ValueError: if no encoder is given, if nothing is to be stored of an encoder, or if the store holds an encoder's name with another
            fingerprint or with features of another kind.
    """
    if not encoders:
        raise ValueError("no encoders: give at least one")
    manifest = _manifest_to_fill(store)
    for name, encoder in encoders.items():
        entry = describe(encoder, view) | {
            "folder": _folder(name),
            "grid": list(encoder.grid),
            "width": encoder.width,
            "embed_dim": encoder.embed_dim,
            "embeddings": embeddings and encoder.embed_dim is not None,
            "tokens": tokens,
            "dtype": str(dtype or next(encoder.tower.parameters()).dtype).removeprefix("torch."),
        }
        if not entry["embeddings"] and tokens is None:
            raise ValueError(f"nothing to store of {name}: ask for patch tokens (int8, float16 or bfloat16)")
        stored = manifest["encoders"].setdefault(name, entry)
        refuse_other(store, name, stored, entry)
        if different := [f"{kind} {stored[kind]}, not {entry[kind]}" for kind in KINDS if stored[kind] != entry[kind]]:
            raise ValueError(
                f"{store} holds features of {name!r} with {', '.join(different)}: ask for the same, or use another name or store"
            )
    fingerprints = {name: entry["fingerprint"] for name, entry in manifest["encoders"].items()}
    manifest["store"] = manifest["store"] or run_digest({"images": list(sources), "encoders": fingerprints})
    manifest["shards"] = {name: shards for name, shards in manifest.get("shards", {}).items() if name not in encoders}
    write_sealed(store / MANIFEST, manifest)
    return manifest


def _manifest_to_fill(store: Path) -> dict[str, Any]:
    """Return the manifest of an old or new store, without the entries of a complete run. A damaged manifest is replaced by a new one."""
    manifest: dict[str, Any] = {"store": "", "format": FORMAT, "version": versions("mof-vig")["mof-vig"], "encoders": {}}
    try:
        if (store / MANIFEST).is_file():
            manifest = read_manifest(store)
    except DamagedError as error:
        identities = {table_run(file) for file in index_files(store)} - {""}
        if len(identities) != 1:
            raise
        logger.warning("%s; it is written anew for the encoders of this run; `mof encode` with the others enters them again", error)
        manifest["store"] = identities.pop()
    return {key: value for key, value in manifest.items() if key != "files"}


def run_of(manifest: Mapping[str, Any], name: str) -> str:
    """Return the run that the shards of an encoder hold. It depends on the store, the encoder and the kinds of features."""
    entry = manifest["encoders"][name]
    return run_digest({"store": manifest["store"], **{key: entry[key] for key in ("fingerprint", *KINDS)}})


def shards_of(store: Path, entry: Mapping[str, Any]) -> list[Path]:
    """Return the shards of an encoder in order, given its entry in the manifest."""
    return numbered(store / entry["folder"], "features", ".safetensors")


def complete(store: Path, manifest: Mapping[str, Any], errors: Mapping[str, dict[str, float]]) -> None:
    """Record in the manifest that a run is complete: the digests of its lists, the names of its shards, and the int8 errors by encoder.

    The lists of other encoders' shards stay as they are, so that a missing shard is still noticed.
    """
    entries = {name: entry | ({"int8_error": errors[name]} if name in errors else {}) for name, entry in manifest["encoders"].items()}
    files = {name: file_digest(store / name) for name in (FAILURES, VIEW)}
    shards = {name: [shard.name for shard in shards_of(store, entry)] for name, entry in entries.items()} | manifest["shards"]
    write_sealed(store / MANIFEST, {**manifest, "encoders": entries, "files": files, "shards": shards})


def _folder(name: str) -> str:
    """Return a readable and unique folder name for an encoder, because the name of the encoder may be a long path."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('.-')[-40:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
