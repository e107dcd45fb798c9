"""These functions write the report as an HTML file that needs no other file, and as text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markupsafe import Markup

from encoders import ImageError, read_image
from encoders.pages import write_page
from encoders.pages.charts import Bar, interval_bars, to_svg
from encoders.pages.thumbnails import thumbnail_uri
from mof.evals.benchmark import Row
from mof.evals.outcomes import Outcome
from mof.evals.plots import pattern_lines
from mof.evals.published import MMVP_CORRELATION, published_rows
from mof.evals.report import Report, precision
from mof.evals.text_tables import TextTable

MOST_COLUMNS = 8  # in a table
WRONG_PAIRS, PHOTO_SIDE = 12, 240  # pairs that are shown for each run, and the side of their photos in pixels


def write_html(report: Report, file: Path) -> None:
    """Write the page."""
    lines, published = report.encoders | report.patterns, published_rows(report.columns)
    write_page(
        file,
        Path(__file__).with_name("report.html"),
        report=report,
        cells={model: {key: row.get(key) for key in report.columns} for model, row in report.rows.items()},
        parts=_parts(_by_benchmark(report)),
        precision=precision(report),
        wrong_pairs=WRONG_PAIRS,
        charts=list(_charts(report)),
        seeds=any(cell.spread is not None for row in report.rows.values() for cell in row.values()),
        pattern_chart=to_svg(pattern_lines(lines, report.encoders), "right pairs by pattern, %") if lines else None,
        published=published,
        published_keys=[key for key in report.columns if any(key in row for models in published.values() for row in models.values())],
        wrong=[_wrong_pairs(outcome) for outcome in report.outcomes if outcome.wrong_pairs],
        published_correlations=MMVP_CORRELATION,
    )


def _parts(groups: dict[str, list[str]]) -> list[dict[str, list[str]]]:
    """Return the benchmarks of each table: as many as a window of 1280 pixels shows beside the models."""
    parts: list[dict[str, list[str]]] = [{}]
    for benchmark, keys in groups.items():
        if parts[-1] and sum(map(len, parts[-1].values())) + len(keys) > MOST_COLUMNS:
            parts.append({})
        parts[-1][benchmark] = keys
    return parts


def _wrong_pairs(outcome: Outcome) -> dict[str, Any]:
    """Return the first wrong pairs of a run, of different patterns if possible, with their photos if these are still there."""
    by_pattern: dict[str | None, list[tuple[Row, Row]]] = {}
    for pair in outcome.wrong_pairs:
        by_pattern.setdefault(pair[0].get("pattern"), []).append(pair)
    mixed = [pair for level in zip_longest(*by_pattern.values()) for pair in level if pair is not None][:WRONG_PAIRS]
    shown = [[row | {"photo": _photo(row.get("image"))} for row in pair] for pair in mixed]
    return {"model": outcome.model, "seed": outcome.seed, "count": len(outcome.wrong_pairs), "basis": outcome.basis, "pairs": shown}


def _photo(file: str | None) -> str | None:
    try:
        return None if file is None else thumbnail_uri(read_image(file), PHOTO_SIDE)
    except ImageError:  # it was moved
        return None


def _charts(report: Report) -> Iterator[tuple[str, Markup]]:
    """Yield title and chart of each measure that has a chance level or is compared."""
    for key, measure in report.columns.items():
        if measure.chance is not None or measure.compared:
            cells = {model: row[key] for model, row in report.rows.items() if key in row}
            bars = [Bar(model, cell.value, cell.interval, f"{cell.value:.1f}", cell.text) for model, cell in cells.items()]
            chance = None if measure.chance is None else measure.scale * measure.chance
            title = f"{measure.benchmark}, {measure.title}"
            yield title, to_svg(interval_bars(bars, measure.title, chance), title)


def to_tables(report: Report) -> list[TextTable]:
    """Return the table for a terminal or a text file, with a part for each benchmark, as the whole table would be too wide."""
    tables = []
    for benchmark, keys in _by_benchmark(report).items():
        rows = {
            model: [cells[key].text.replace(" [", "\n[") if key in cells else "-" for key in keys]
            for model, cells in report.rows.items()
            if any(key in cells for key in keys)
        }
        tables.append(TextTable(benchmark, [report.columns[key].title for key in keys], rows, "model"))
    return tables


def _by_benchmark(report: Report) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, measure in report.columns.items():
        groups.setdefault(measure.benchmark, []).append(key)
    return groups
