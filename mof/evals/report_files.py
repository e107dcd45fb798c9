"""`write_files` writes the table of a report for other programs: CSV for spreadsheets, Markdown for texts, LaTeX for papers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from encoders.csv_cells import write_csv
from encoders.whole_files import write_text
from mof.evals.report import Cell, Report

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {sign: f"\\{sign}" for sign in "&%$#_{}"}


def write_files(report: Report, page: Path) -> list[Path]:
    """Write the table beside the page as .csv, .md and .tex; return the files."""
    files = [page.with_suffix(suffix) for suffix in (".csv", ".md", ".tex")]
    write_csv(files[0], _csv_rows(report))
    write_text(files[1], to_markdown(report))
    write_text(files[2], to_latex(report))
    return files


def _csv_rows(report: Report) -> Iterator[list[Any]]:
    """Yield for each measure its value, the interval's ends, the spread over seeds and their number."""
    parts = ("", " low", " high", " spread", " runs")
    yield ["model", *(f"{measure.benchmark} {measure.title}{part}" for measure in report.columns.values() for part in parts)]
    for model, cells in report.rows.items():
        line: list[Any] = [model]
        for cell in (cells.get(key) for key in report.columns):
            low, high = (None, None) if cell is None or cell.interval is None else cell.interval
            values = (None,) * 4 if cell is None else (cell.value, low, high, cell.spread)
            line += ["" if value is None else round(value, 4) for value in values]
            line.append("" if cell is None else cell.seeds)
        yield line


def _rows(report: Report, shown: Callable[[Cell], str], text: Callable[[str], str]) -> Iterator[list[str]]:
    """Yield the heading and a row per model; a dash stands for a figure that was not measured."""
    yield ["model", *(text(f"{measure.benchmark}, {measure.title}") for measure in report.columns.values())]
    for model, cells in report.rows.items():
        yield [text(model), *(shown(cells[key]) if key in cells else "-" for key in report.columns)]


def to_markdown(report: Report) -> str:
    """Return the table with intervals in Markdown."""
    heading, *rows = _rows(report, lambda cell: cell.text, lambda text: re.sub(r"([\\|*_`<\[])", r"\\\1", text))
    ruler = ["---", *["---:"] * len(report.columns)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (heading, ruler, *rows))


def result_facts(report: Report) -> dict[str, str]:
    """Return name -> value for the card of the only model of the report: a row per measure, and the data of each benchmark."""
    [cells] = report.rows.values()
    measures = {f"{measure.benchmark}, {measure.title}": cells[key].text for key, measure in report.columns.items() if key in cells}
    return measures | {f"data of {benchmark}": basis for _, benchmark, basis, _ in report.notes}


def to_latex(report: Report) -> str:
    """Return the table with intervals in LaTeX; it needs the package booktabs."""

    def shown(cell: Cell) -> str:
        return cell.text.replace("±", r"$\pm$").replace("[", r"{\scriptsize [").replace("]", "]}")

    heading, *rows = (
        " & ".join(row) + r" \\" for row in _rows(report, shown, lambda text: "".join(_LATEX.get(sign, sign) for sign in text))
    )
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(report.columns)}}}",
        r"\toprule",
        heading,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(["% \\usepackage{booktabs}; the brackets hold 95 % intervals", *lines, ""])
