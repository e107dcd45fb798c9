"""Two encoders have the same fingerprint if their models, every bit of their weights and their preprocessing are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from encoders.base import Encoder
from encoders.preprocessing import View

NOT_IN_FEATURES = ("trainable", "weights")
"""Entries of an encoder's spec on which its features do not depend. The weights themselves are compared, not the name of their file."""


def fingerprint(encoder: Encoder, view: View | None = None) -> str:
    """Return 32 hexadecimal digits that identify the encoder's features, up to differences by device and precision.

    They depend on its spec (name, input size, layer, norm), its preprocessing or the `view`, and every bit of its weights. Weights of
    another dtype are other weights, so an encoder that was cast to bfloat16 has another fingerprint.
    """
    return describe(encoder, view)["fingerprint"]


def describe(encoder: Encoder, view: View | None = None) -> dict[str, Any]:
    """Return the encoder's `fingerprint` and the parts from which it is computed, for a manifest (JSON-able)."""
    identity = {
        "spec": {key: value for key, value in encoder.spec.items() if key not in NOT_IN_FEATURES},
        "preprocessing": encoder.preprocessing.description,
        "view": None if view is None else view.description,
        "weights": weights_digest(encoder.tower),
    }
    text = json.dumps(identity, sort_keys=True)
    return {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:32], **json.loads(text)}


def refuse_other(store: Path, name: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the manifest's entry `stored` has the fingerprint of the encoder `given`."""
    if stored["fingerprint"] == given["fingerprint"]:
        return
    parts = ("spec", "preprocessing", "view", "weights")
    changed = [f"{part} {stored[part]} there, {given[part]} now" for part in parts if stored[part] != given[part]]
    raise ValueError(
        f"the features stored as {name!r} in {store} have the fingerprint {stored['fingerprint']}, this encoder has "
        f"{given['fingerprint']}: {'; '.join(changed)}. Use the encoder they were made with, or encode under another name or into "
        "another store"
    )


def weights_digest(tower: nn.Module) -> str:
    """Return a digest of the names, shapes, dtypes and bytes of the tower's state. It takes about a second per gigabyte."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1).contiguous().cpu()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
