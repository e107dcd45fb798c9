"""write_run_page writes the page at the end of a run: accuracies, every row's answers to the same pairs, and links to the pages of VIG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encoders import read_image
from encoders.pages import write_page
from encoders.pages.charts import to_svg
from encoders.pages.thumbnails import thumbnail_uri
from mof.evals.mmvp import Question
from study.plots import accuracy_bars
from study.result_tables import grouped, spread

SIDE = 160  # pixels of a shown picture


def example_pairs(questions: Sequence[Question]) -> list[tuple[Question, Question]]:
    """Return the first pair of each pattern."""
    pairs: dict[str | None, tuple[Question, Question]] = {}
    for first, second in zip(questions[0::2], questions[1::2], strict=True):
        pairs.setdefault(first.pattern, (first, second))
    return list(pairs.values())


def write_run_page(file: Path, rows: Sequence[Mapping[str, Any]], questions: Sequence[Question], scored: Sequence[Path]) -> None:
    """Write the page of a run, which is a single file.

    Args:
        rows: the rows of results.json; their "examples" are the answers to `example_pairs` by the id of the question.
        questions: all held-out questions.
        scored: pages of scored records, in the folder of the page.
    """
    by_name = grouped(rows, "name")
    table = [
        {
            "name": name,
            "cells": [spread([row.get(key) for row in seeds]) for key in ("pair_accuracy", "question_accuracy", "misled_accuracy")],
            "tokens": [seeds[0]["visual_tokens"], round(sum(row["active_tokens"] for row in seeds) / len(seeds))],
            "seeds": len(seeds),
        }
        for name, seeds in by_name.items()
    ]
    pairs = [[_shown(question, by_name) for question in pair] for pair in example_pairs(questions)]
    links = [(path.relative_to(file.parent).as_posix(), f"{path.parent.name}: {path.stem}") for path in scored]
    chart = to_svg(accuracy_bars(rows), "right answers by row, %")
    write_page(file, Path(__file__).with_name("page.html"), rows=table, chart=chart, pairs=pairs, links=links)


def _shown(question: Question, by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the picture of a question, its right answer, and each row's answer with the first seed, as the page shows them."""
    right, wrong = (word for letter, word in sorted(question.options.items(), key=lambda option: option[0] != question.labels["released"]))
    answers = {name: seeds[0].get("examples", {}).get(str(question.id)) for name, seeds in by_name.items()}
    assert question.image is not None
    return {
        "pattern": question.pattern, "question": question.question, "right": right,
        "picture": thumbnail_uri(read_image(question.image), SIDE),
        "answers": [(name, answer, right in answer and wrong not in answer) for name, answer in answers.items() if answer is not None],
    }  # fmt: skip
