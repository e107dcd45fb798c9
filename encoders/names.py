"""These functions compare and split names of models."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_names(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean a, b?' for error messages, or '' when no known name is similar."""
    lower = {key.lower(): key for key in known}
    near = [lower[key] for key in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
    return f" Did you mean {', '.join(near)}?" if near else ""


def split_weights(model: str) -> tuple[str, str | None]:
    """Split 'model/tag-or-file' into (model, tag or file). "hf-hub:..." and "local-dir:..." stay whole."""
    if ":" in model:
        return model, None
    model, _, weights = model.partition("/")
    return model, weights or None
