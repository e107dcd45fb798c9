"""With these functions, the task amber_d of lmms-eval shows a row and scores an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from encoders import read_image

FOLDER = Path("AMBER")
IMAGES = ("image", "images")  # the authors' name, and a common copy's


@cache
def truths(file: Path) -> dict[int, str]:
    """Return the id of each question -> "yes" or "no"."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return {int(row["id"]): row["truth"] for row in rows if row["type"].startswith("discriminative")}


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    files = [FOLDER / folder / Path(doc["image"]).name for folder in IMAGES]
    return [read_image(next((file for file in files if file.is_file()), files[0]))]


def doc_to_target(doc: dict[str, Any]) -> str:
    return truths((FOLDER / "data" / "annotations.json").resolve())[int(doc["id"])]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Return whether the first yes or no of the answer is right, and both for F1. An answer with neither is wrong."""
    said = re.search(r"\b(yes|no)\b", results[0].casefold())
    pair = doc_to_target(doc), said[1] if said else ""
    return {"amber_accuracy": float(pair[0] == pair[1]), "amber_f1": pair}


def f1(pairs: Sequence[tuple[str, str]]) -> float:
    """Return F1 of the hallucinated class, which is "no", as in the authors' script; 0 without a right "no"."""
    right = sum(truth == said == "no" for truth, said in pairs)
    return 2 * right / max(1, sum(truth == "no" for truth, _ in pairs) + sum(said == "no" for _, said in pairs))
