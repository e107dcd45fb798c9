"""A report as one HTML file that needs nothing else, and as text."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE
from rich.table import Table

from mof.evals.charts import interval_chart, pattern_chart
from mof.evals.published import MMVP_CORRELATION, published_rows
from mof.evals.report import Report, precision


def write_html(report: Report, file: Path) -> None:
    """The page, self-contained."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("mof.evals").joinpath("report.html").read_text(encoding="utf-8"))
    cells = {model: {key: by.get(key) for key in report.columns} for model, by in report.rows.items()}
    page = template.render(
        report=report, cells=cells, groups=_by_benchmark(report), precision=precision(report), charts=_charts(report),
        seeds=any(cell.spread is not None for by in report.rows.values() for cell in by.values()),
        pattern_drawing=_pattern_drawing(report), published=published_rows(report.columns), published_correlations=MMVP_CORRELATION,
    )  # fmt: skip
    file.write_text(page, encoding="utf-8")


def _charts(report: Report) -> list[tuple[str, str]]:
    drawn = []
    for key, measure in report.columns.items():
        if measure.chance is not None or measure.compared:
            cells = {model: by[key] for model, by in report.rows.items() if key in by}
            chance = None if measure.chance is None else measure.scale * measure.chance
            title = f"{measure.benchmark}, {measure.title}"
            drawn.append((title, interval_chart(title, cells, chance)))
    return drawn


def _pattern_drawing(report: Report) -> str | None:
    lines = report.encoders | report.patterns
    names = list(dict.fromkeys(pattern for by in lines.values() for pattern in by))
    return pattern_chart("right pairs by pattern, %", names, lines, list(report.encoders)) if names else None


def to_tables(report: Report) -> list[Table]:
    """The table for a terminal or a text file, in one piece per benchmark: whole, it would be too wide to read."""
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
