"""With these functions, the task mmvp_vlm_choice of lmms-eval shows a photo with its pair's statements, and counts right pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from encoders import read_image
from mof.evals.mmvp_vlm import Item, read_mmvp_vlm
from mof.evals.option_matching import match_answer

FOLDER = Path("MMVP_VLM")
REQUEST = "Answer with the option's letter from the given choices directly."


@cache
def items(folder: Path) -> dict[int, Item]:
    return {item.id: item for item in read_mmvp_vlm(folder)}


def item_of(doc: dict[str, Any]) -> Item:
    return items(FOLDER.resolve())[int(doc["Question ID"])]


def options_of(item: Item) -> dict[str, str]:
    """Return "a" and "b" -> the statements of the item's pair, in the order of the file."""
    first = item.id - (item.id + 1) % 2
    return {letter: items(FOLDER.resolve())[first + k].statement for k, letter in enumerate("ab")}


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [read_image(item_of(doc).image)]


def doc_to_text(doc: dict[str, Any]) -> str:
    options = " ".join(f"({letter}) {statement}" for letter, statement in options_of(item_of(doc)).items())
    return f"Which statement describes the image? {options}\n{REQUEST}"


def doc_to_target(doc: dict[str, Any]) -> str:
    return "ba"[item_of(doc).id % 2]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    item = item_of(doc)
    right = match_answer(results[0], options_of(item)) == doc_to_target(doc)
    return {"mmvp_vlm_pairs": ((item.id + 1) // 2, right)}


def right_pairs(results: Sequence[tuple[int, bool]]) -> float:
    """Return the share of pairs with both photos right. A pair does not count if only one of its photos was asked."""
    pairs: dict[int, list[bool]] = {}
    for pair, right in results:
        pairs.setdefault(pair, []).append(right)
    whole = [rights for rights in pairs.values() if len(rights) == 2]
    return sum(map(all, whole)) / max(1, len(whole))
