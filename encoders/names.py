"""These functions compare, split and list names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def near_names(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean a, b?' for error messages, or '' when no known name is similar."""
    lower = {key.lower(): key for key in known}
    near = [lower[key] for key in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
    return f" Did you mean {', '.join(near)}?" if near else ""


def first_names(names: Sequence[str], most: int = 20) -> str:
    """Return the first names as text for a message, with ", ..." in place of all further names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def split_weights(model: str) -> tuple[str, str | None]:
    """Split 'model/tag-or-file' into (model, tag or file). "hf-hub:..." and "local-dir:..." stay whole."""
    if ":" in model:
        return model, None
    model, _, weights = model.partition("/")
    return model, weights or None
