"""`pairs_html` shows pairs of images as a table with pictures, in notebooks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from encoders.images.opening import ImageError
from encoders.images.reading import read_image
from encoders.pages.notebook import notebook_table, picture

SHOWN = 8
"""Number of pairs in the table at most."""


def pairs_html(title: str, pairs: Iterable[tuple[Sequence[str | os.PathLike[str]], Sequence[float]]], count: int) -> str:
    """Return a table with both images of each pair, or their numbers, and its similarities.

    Args:
        pairs: the two image files of each pair, or numbers as texts, and CLIP's and DINOv2's cosine.
        count: the number of pairs, of which the first are shown.
    """
    first = islice(pairs, SHOWN)
    rows = [[*map(_shown, images), *(f"{value:.3f}" for value in (clip, dino, clip - dino))] for images, (clip, dino) in first]
    note = f"The first {SHOWN} of {count:,} pairs." if count > SHOWN else ""
    return notebook_table(title, rows, ("image", "image", "CLIP", "DINO", "gap"), note)


def _shown(image: str | os.PathLike[str]) -> Any:
    """Return the picture of a file, its name for a file that cannot be read, and a text as it is."""
    if isinstance(image, str):
        return image
    try:
        return picture(read_image(image).convert("RGB"), Path(image).name)
    except ImageError:
        return f"{Path(image).name} (cannot be read)"
