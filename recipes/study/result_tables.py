"""These functions show the rows of results.json as tables: accuracies and costs, bars, and differences between ways with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.bar import Bar
from rich.box import SIMPLE
from rich.table import Table
from scipy.stats import ttest_1samp

from mof.evals.text_tables import TextTable


def study_tables(rows: Sequence[dict[str, Any]]) -> list[TextTable]:
    """Return a table of accuracies and costs from the rows of results.json, with a line per name: mean and spread over seeds.
    A second table shows pair accuracy by pattern, where pairs were asked.

    The column "misled" is the accuracy of questions after a false statement, where that was measured; other tables show the trained
    parameters of the mixer instead.
    """
    by_name = grouped(rows, "name")
    shares = {"pairs": "pair_accuracy", "questions": "question_accuracy", "misled": "misled_accuracy"}
    adapters = {"adapters": "adapter_parameters"}
    if any("misled_accuracy" in row for row in rows):
        del adapters["adapters"]  # for a line of 80 characters
    else:
        del shares["misled"]
    cells = {
        name: [
            *(spread([row.get(key) for row in same]) for key in shares.values()),
            str(same[0]["visual_tokens"]),
            *(f"{same[0][key]:,}" for key in adapters.values()),
            f"{statistics.fmean(row['active_tokens'] for row in same):,.0f}",
            f"{statistics.fmean(row['seconds'] for row in same):.0f}",
            str(len(same)),
        ]
        for name, same in by_name.items()
    }
    headings = [*shares, "visual tokens", *adapters, "active tokens", "seconds", "seeds"]
    tables = [TextTable("held-out scenes, right in %; a pair is two questions, by chance 25", headings, cells, "row")]
    if patterns := list(rows[-1]["by_pattern"]):
        means = {
            name: [statistics.fmean(row["by_pattern"][pattern] for row in same) for pattern in patterns] for name, same in by_name.items()
        }
        shown = {name: [f"{100 * mean:.0f}" for mean in row] for name, row in means.items()}
        tables.append(TextTable("pair accuracy by pattern, mean over seeds, %", patterns, shown, "row"))
    return tables


def bars(rows: Sequence[dict[str, Any]]) -> Table:
    """Return right pairs, and right questions after a false statement, as bars in the terminal; mean over seeds."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("row", no_wrap=True)
    measures = {"pairs, %": "pair_accuracy", "misled, %": "misled_accuracy"}
    measures = {heading: measure for heading, measure in measures.items() if all(row.get(measure) is not None for row in rows)}
    for heading in measures:
        table.add_column(heading, justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
    for name in dict.fromkeys(row["name"] for row in rows):
        cells: list[Any] = []
        for measure in measures.values():
            mean = 100 * statistics.fmean(row[measure] for row in rows if row["name"] == name)
            cells += [f"{mean:.1f}", Bar(100, 0, mean, width=16, color="blue")]
        table.add_row(name, *cells)
    return table


def contrasts(rows: Sequence[dict[str, Any]], key: str = "selection", controls: Sequence[str] = ("random", "everything")) -> Table:
    """Return each way's difference to the controls with each noise, in points of pair accuracy, paired over seeds.

    The intervals have 95 % by Student's t. Over seeds, they say nothing about other pictures than the held-out pictures. Over pairs,
    they take the mean over seeds of each held-out pair, and say nothing about other seeds.

    Args:
        key: the field of a row that names its way.
        controls: values of this field.
    """
    table = Table(title="differences in pair accuracy, points [95 % over seeds] [95 % over pairs]", box=SIMPLE)
    for heading in ("noise", "way", *(f"minus {control}" for control in controls), "seeds"):
        table.add_column(heading, no_wrap=True)
    values = {(row["noise"], row[key], row["seed"]): row for row in rows}
    for noise, way in dict.fromkeys(place[:2] for place in values):
        cells = []
        for control in controls:
            seeds = [seed for share, name, seed in values if (share, name) == (noise, way) and (noise, control, seed) in values]
            pairs = [(values[noise, way, seed], values[noise, control, seed]) for seed in seeds]
            cells.append(_contrast(pairs) if way != control else "")
        table.add_row(noise, way, *cells, str(sum(place[:2] == (noise, way) for place in values)))
    return table


def _contrast(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """Return the mean difference between the two rows of each seed, with both of its intervals."""
    if not pairs:
        return "-"
    by_seed = [100 * (way["pair_accuracy"] - control["pair_accuracy"]) for way, control in pairs]
    by_pair = np.mean([np.subtract(way["pairs_right"], control["pairs_right"], dtype=float) for way, control in pairs], axis=0)  # [pairs]
    return f"{statistics.fmean(by_seed):+.1f}{_interval(by_seed)}{_interval(100 * by_pair)}"


def _interval(values: Sequence[float] | NDArray[np.float64]) -> str:
    """Return the interval of the mean, where there are at least two values."""
    if len(values) < 2:
        return ""
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return f" [{low:+.1f}, {high:+.1f}]"


def grouped(rows: Sequence[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Return the rows of results.json by their value of `key`, in the order in which the values first appear."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def spread(shares: Sequence[float | None]) -> str:
    """Return shares in [0, 1] as "mean ±standard deviation" in %; "-" where nothing was measured."""
    values = [100 * share for share in shares if share is not None]
    if not values:
        return "-"
    return f"{statistics.fmean(values):.1f}" + (f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else "")
