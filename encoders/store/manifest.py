"""The manifest of a feature store names its encoders, so that no other encoder adds features under their names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from encoders.base import Encoder
from encoders.preprocessing import View
from encoders.runs import versions, write_json
from encoders.store.files import TokenFormat
from encoders.store.fingerprints import describe, refuse_other

MANIFEST, FORMAT = "manifest.json", 1


def read_manifest(store: Path) -> dict[str, Any]:
    """ValueError for a folder that is no store, or one of another version."""
    path = store / MANIFEST
    if not path.is_file():
        raise ValueError(f"{store} holds no {MANIFEST}: expected a feature store that `mof encode` wrote")
    manifest = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{store} is of format {manifest.get('format')}, this version reads {FORMAT}: encode again, or update mof-vig")
    return manifest


def declare(
    store: Path,
    encoders: Mapping[str, Encoder],
    view: View | None,
    *,
    embeddings: bool,
    tokens: TokenFormat | None,
    dtype: torch.dtype | None,
) -> dict[str, dict[str, Any]]:
    """Enter the encoders into the store's manifest. Return all its entries by name.

    Raises:
        ValueError: when no encoder is given, nothing is to be stored of one, or the store holds its name with another fingerprint
            or with features of another kind.
    """
    if not encoders:
        raise ValueError("no encoders: give at least one")
    if (store / MANIFEST).is_file():
        manifest = read_manifest(store)
    else:
        manifest = {"format": FORMAT, "version": versions("mof-vig")["mof-vig"], "encoders": {}}
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
        if different := [
            f"{kind} {stored[kind]}, not {entry[kind]}" for kind in ("embeddings", "tokens", "dtype") if stored[kind] != entry[kind]
        ]:
            raise ValueError(
                f"{store} holds features of {name!r} with {', '.join(different)}: ask for the same, or use another name or store"
            )
    write_json(store / MANIFEST, manifest)
    return manifest["encoders"]


def record_errors(store: Path, errors: Mapping[str, dict[str, float]]) -> None:
    """Note the measured int8 errors of encoders, by name."""
    manifest = read_manifest(store)
    for name, error in errors.items():
        manifest["encoders"][name]["int8_error"] = error
    write_json(store / MANIFEST, manifest)


def _folder(name: str) -> str:
    """Return a readable, unique folder name for an encoder, whose own name may be a long path."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('.-')[-40:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
