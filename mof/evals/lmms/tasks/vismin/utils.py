"""With these functions, the task vismin of lmms-eval asks four questions about a pair of photos, and counts pairs with right answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

Result = tuple[int, str, bool]
"""Number of the pair, kind of the question ("text" or "image"), and whether the answer is right."""


def process_docs(dataset: Any) -> Any:
    """Return a data set with a row for each question: of the caption of either photo, then of the photo of either caption."""

    def questions(rows: dict[str, list[Any]], places: list[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {name: [] for name in ("pair", "kind", "images", "question", "answer")}
        for row, place in enumerate(places):
            for kind in ("text", "image"):
                for k in (0, 1):
                    both = [rows["image_0"][row], rows["image_1"][row]]
                    question = re.sub(r"\s*<image_[01]>\s*", " ", rows[f"{kind}_question_{k}"][row]).strip()
                    values = (place, kind, [both[k]] if kind == "text" else both, question, rows[f"{kind}_answer_{k}"][row])
                    for name, value in zip(made, values, strict=True):
                        made[name].append(value)
        return made

    return dataset.map(questions, batched=True, batch_size=16, with_indices=True, remove_columns=dataset.column_names)


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [image.convert("RGB") for image in doc["images"]]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Result]:
    right = _first_word(results[0]) == _first_word(doc["answer"])
    return dict.fromkeys(("vismin_text", "vismin_image", "vismin_group"), (doc["pair"], doc["kind"], right))


def _first_word(answer: str) -> str:
    """Return the first word in lower case: "a" for "(A) a red cat", "first" for "First."."""
    words = re.findall(r"\w+", answer.casefold())
    return words[0] if words else ""


def text_accuracy(results: Sequence[Result]) -> float:
    return _accuracy(results, ("text",))


def image_accuracy(results: Sequence[Result]) -> float:
    return _accuracy(results, ("image",))


def group_accuracy(results: Sequence[Result]) -> float:
    return _accuracy(results, ("text", "image"))


def _accuracy(results: Sequence[Result], kinds: tuple[str, ...]) -> float:
    """Return the share of pairs with all questions of these kinds right, among the pairs whose questions were all asked."""
    pairs: dict[int, list[bool]] = {}
    for pair, kind, right in results:
        if kind in kinds:
            pairs.setdefault(pair, []).append(right)
    whole = [rights for rights in pairs.values() if len(rights) == 2 * len(kinds)]
    return sum(map(all, whole)) / max(1, len(whole))
