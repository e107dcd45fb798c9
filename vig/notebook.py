"""These functions show scores and selections in notebooks: answers coloured by VIG, and a table of counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from encoders.pages import colour_scale
from encoders.pages.notebook import notebook_html, notebook_table, shortened
from vig.selection.summary import Counts, Summary
from vig.words import token_texts

if TYPE_CHECKING:
    from vig.scoring.score_table import Score

# Shapes: A = answer tokens of all records.

SHOWN = 3
"""Number of the highest and of the lowest scores whose answers are shown."""
TOKENS, LONGEST_TOKEN, SOURCES = 300, 100, 20
"""Tokens of an answer, characters of a token, and sources of a selection that are shown at most."""


def scores_html(summary: str, scores: Sequence[Score], token_vig: NDArray[np.float32]) -> str:
    """Return the summary, and the answers of these scores with each token coloured by its VIG; `token_vig` [A] sets the scale."""
    template = Path(__file__).with_name("report") / "scores.html.jinja"
    answers = [_answer(score) for score in scores]
    return notebook_html(template, summary=summary.splitlines(), answers=answers, scale=colour_scale(token_vig))


def selection_html(summary: Summary) -> str:
    """Return a table with the counts of a selection, and of its sources."""
    title, *lines = str(summary).splitlines()
    sources = list(summary.sources.items())[:SOURCES]
    rows = [_counted("all", summary), *(_counted(name, counts) for name, counts in sources)]
    left_out = len(summary.sources) - len(sources)
    notes = lines[: len(lines) - len(summary.sources)]  # a warning; the other lines are the sources
    notes += [f"{left_out} more sources; summary() shows all"] if left_out else []
    return notebook_table(title, rows, ("source", "records kept", "of", "answer tokens kept", "of", "without a loss"), " ".join(notes))


def _counted(name: str, counts: Counts) -> list[Any]:
    numbers = (counts.samples_kept, counts.samples_total, counts.tokens_kept, counts.tokens_total)
    return [name, *(f"{number:,}" for number in numbers), f"{counts.sparsity:.1%}"]


def _answer(score: Score) -> dict[str, Any]:
    texts = [text[:LONGEST_TOKEN] for text in token_texts(score)[:TOKENS]]
    tokens = list(zip(texts, score.token_vig.tolist(), strict=False))
    return {"id": shortened(score.id), "vig": score.vig, "tokens": tokens, "left_out": len(score.token_vig) - len(tokens)}
