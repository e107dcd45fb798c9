"""A raw record has an id and a digest, by which scores, selections and trainings recognise it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from encoders.images.reading import pixels_of
from mof.data.forms import is_empty, is_tensor

SCORED = "scored_digest"
"""The key of a selected record under which its digest stands. The digest is made without the keys `SELECTED`."""
SELECTED = ("token_mask", "token_weights", SCORED)
"""The keys that a selection adds to a record."""
_SELECTED = frozenset(SELECTED)


def record_id(raw: Any) -> str:
    """Return the id of a raw record, or a digest of its content if it has none.

    The digest leaves out the keys `SELECTED`, so that a record has the same id in scoring and in training.
    """
    if not isinstance(raw, (dict, Mapping)):  # a dict is told much faster than another mapping
        return digest(raw)
    id: Any = raw.get("id")
    if type(id) is str and id:
        return id
    return digest(unselected(raw)) if is_empty(id) else str(id.item() if is_tensor(id) else id)


def unselected(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record without the keys that a selection adds."""
    return raw if _SELECTED.isdisjoint(raw) else {key: value for key, value in raw.items() if key not in _SELECTED}


def digest(value: Any) -> str:
    """Return 16 hex digits of the SHA-256 of a JSON-able value, which may hold PIL images, arrays and bytes.

    If a part is nested too deeply for JSON, only its type enters the digest.
    """
    try:
        text = _as_json(value)
    except RecursionError:
        entries = value.items() if isinstance(value, Mapping) else enumerate(value if isinstance(value, (list, tuple)) else ())
        text = _as_json([type(value).__name__, *((str(key), _shallow_json(entry)) for key, entry in entries)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_json(value: Any) -> str:
    try:
        return _encode(value)
    except TypeError:  # keys that JSON does not know, or that cannot be sorted
        return _encode(_with_text_keys(value))


def _shallow_json(value: Any) -> str:
    try:
        return _as_json(value)
    except RecursionError:
        return type(value).__name__


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{type(key).__name__} {key}": _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: for bytes and images (as encoders see them) a hash, for other values their text."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Image.Image):
        mode, size, pixels = pixels_of(value)
        return [mode, size, hashlib.sha256(pixels).hexdigest()]
    if is_tensor(value):
        value = value.cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)):  # the text of an array leaves out its middle
        if value.dtype.hasobject:  # its bytes are addresses in memory
            return [str(value.dtype), value.shape, value.tolist()]
        return [str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    return str(value)


_encode = json.JSONEncoder(sort_keys=True, check_circular=False, default=_plain).encode  # made once, as millions are digested
