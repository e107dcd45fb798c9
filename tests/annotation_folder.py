"""A folder such as `mof blind-pairs` writes, for the tests of the annotation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EMPTY: dict[str, Any] = {
    "pattern": None, "statements": ["", ""], "question": "", "options": ["", ""], "right": [None, None], "mark": None
}  # fmt: skip
COMPLETE: dict[str, Any] = {
    "pattern": "State", "statements": ["open wings", "closed wings"], "question": "Are the wings open or closed?",
    "options": ["Open", "Closed"], "right": ["a", "b"], "mark": None,
}  # fmt: skip


def write_folder(folder: Path, pairs: int = 3) -> Path:
    """Pair k is of k-left.jpg and k-right.png, noise of 16 x 16; pairs.csv names them by absolute paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for k in range(pairs):
        names = folder / f"{k}-left.jpg", folder / f"{k}-right.png"
        for name in names:
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(name)
        rows.append((2 * k, 2 * k + 1, *names, 0.99 - k / 100, 0.25, 0.74 - k / 100))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("i", "j", "image_i", "image_j", "clip_similarity", "dino_similarity", "gap"), *rows])
    return folder
