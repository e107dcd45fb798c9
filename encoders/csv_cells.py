"""write_csv writes CSV files whose cells no spreadsheet takes for formulas."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from encoders.whole_files import write_whole

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes a text with this start for a formula
QUOTE = "'"


def csv_cell(value: Any) -> Any:
    """Return the value for a CSV file. A quote is put before a text that looks like a formula, so that it is shown and not run."""
    return QUOTE + value if isinstance(value, str) and value.lstrip(QUOTE).startswith(FORMULA_STARTS) else value


def plain_cell(text: str) -> str:
    """Return the text that `csv_cell` was given."""
    return text[1:] if text.startswith(QUOTE) and text.lstrip(QUOTE).startswith(FORMULA_STARTS) else text


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write the rows as a CSV file, with `csv_cell` for each cell."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([csv_cell(value) for value in row] for row in rows)

    write_whole(path, write)
