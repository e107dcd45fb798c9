"""A report as one HTML file that needs nothing else, and as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup
from rich.box import SIMPLE
from rich.table import Table

from encoders.pages import write_page
from encoders.pages.charts import Bar, interval_bars, to_svg
from mof.evals.plots import pattern_lines
from mof.evals.published import MMVP_CORRELATION, published_rows
from mof.evals.report import Report, precision


def write_html(report: Report, file: Path) -> None:
    """Write the page."""
    lines = report.encoders | report.patterns
    write_page(
        file,
        Path(__file__).with_name("report.html"),
        report=report,
        cells={model: {key: row.get(key) for key in report.columns} for model, row in report.rows.items()},
        groups=_by_benchmark(report),
        precision=precision(report),
        charts=list(_charts(report)),
        seeds=any(cell.spread is not None for row in report.rows.values() for cell in row.values()),
        pattern_chart=to_svg(pattern_lines(lines, report.encoders), "right pairs by pattern, %") if lines else None,
        published=published_rows(report.columns),
        published_correlations=MMVP_CORRELATION,
    )


def _charts(report: Report) -> Iterator[tuple[str, Markup]]:
    """Yield title and chart of each measure that has a chance level or is compared."""
    for key, measure in report.columns.items():
        if measure.chance is not None or measure.compared:
            cells = {model: row[key] for model, row in report.rows.items() if key in row}
            bars = [Bar(model, cell.value, cell.interval, f"{cell.value:.1f}", cell.text) for model, cell in cells.items()]
            chance = None if measure.chance is None else measure.scale * measure.chance
            title = f"{measure.benchmark}, {measure.title}"
            yield title, to_svg(interval_bars(bars, measure.title, chance), title)


def to_tables(report: Report) -> list[Table]:
    """Return the table for a terminal or a text file, one part per benchmark: the whole table would be too wide to read."""
    tables = []
    for benchmark, keys in _by_benchmark(report).items():
        table = Table(title=benchmark, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("model", overflow="fold")
        for key in keys:
            table.add_column(report.columns[key].title, justify="right", overflow="fold")
        for model, cells in report.rows.items():
            if any(key in cells for key in keys):
                table.add_row(model, *(cells[key].text.replace(" [", "\n[") if key in cells else "-" for key in keys))
        tables.append(table)
    return tables


def _by_benchmark(report: Report) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, measure in report.columns.items():
        groups.setdefault(measure.benchmark, []).append(key)
    return groups
