"""Cells of CSV files that spreadsheets do not take for formulas."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from encoders.runs import write_whole

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a text that begins so may be a formula; our numbers are no texts
QUOTE = "'"


def csv_cell(value: Any) -> Any:
    """Return the value for a CSV file: a quote stands before a text that would start a formula, so that it is shown, not run."""
    return QUOTE + value if isinstance(value, str) and value.lstrip(QUOTE).startswith(FORMULA_STARTS) else value


def plain_cell(text: str) -> str:
    """Return the text that `csv_cell` was given."""
    return text[1:] if text.startswith(QUOTE) and text.lstrip(QUOTE).startswith(FORMULA_STARTS) else text


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write the rows, whole, with `csv_cell` for each cell."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([csv_cell(value) for value in row] for row in rows)

    write_whole(path, write)
