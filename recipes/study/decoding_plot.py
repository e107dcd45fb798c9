"""plot_decoding draws the results of `compare_decoding.py`: pairs and misled questions by method, and accuracy against the share of yes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encoders.pages.charts import COLOURS, LINES, figure, save

Rows = Sequence[Mapping[str, Any]]
CONTROL = ("greedy", "yes +", "yes -")
"""The line of controls joins the ways whose names begin so."""


def plot_decoding(rows: Rows, file: Path) -> None:
    """Write the chart, with a colour for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    greedy = [way for way in dict.fromkeys(row["way"] for row in rows) if not way.startswith(("yes", "sampled"))]
    with figure(1250, 90 + 20 * len(greedy)) as drawn:
        *dots, told = drawn.subplots(1, 3)
        for axes, measure in zip(dots, ("pairs", "misled"), strict=True):
            for number, model in enumerate(models):
                _draw_dots(axes, rows, model, greedy, measure, COLOURS[LINES[number]])
            axes.set_yticks(range(len(greedy)), greedy if measure == "pairs" else [""] * len(greedy), color=COLOURS["text"])
            axes.invert_yaxis()
            axes.set_xlabel({"pairs": "pairs right, %", "misled": "misled questions right, %"}[measure] + " (lines: greedy)")
        for number, model in enumerate(models):
            colour = COLOURS[LINES[number]]
            control = sorted(_points(rows, model, [way for way in dict.fromkeys(row["way"] for row in rows) if way.startswith(CONTROL)]))
            told.plot(*zip(*control, strict=True), color=colour, linewidth=1.5, alpha=0.6)
            told.plot(*zip(*_points(rows, model, greedy), strict=True), ".", color=colour)
            told.plot(*zip(*_points(rows, model, ["greedy"]), strict=True), "s", color=colour, markersize=9, markerfacecolor="none")
        told.set_xlabel("answers that are yes, %\n(line: a constant on the yes logit; square: greedy)")
        told.set_ylabel("yes-or-no questions right, %")
        drawn.legend(*dots[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(models))
        save(drawn, file)


def _draw_dots(axes: Any, rows: Rows, model: str, ways: Sequence[str], measure: str, colour: str) -> None:
    """Draw the mean over seeds of each way, and a line at greedy decoding."""
    for place, way in enumerate(ways):
        if values := _values(rows, model, way, measure, "accuracy"):
            axes.plot(statistics.fmean(values), place, "o", color=colour, label=model if place == 0 else None)
    axes.axvline(statistics.fmean(_values(rows, model, "greedy", measure, "accuracy")), color=colour, linewidth=1, alpha=0.6)


def _values(rows: Rows, model: str, way: str, measure: str, name: str) -> list[float]:
    return [100 * row[measure][name] for row in rows if (row["model"], row["way"]) == (model, way) and measure in row]


def _points(rows: Rows, model: str, ways: Sequence[str]) -> list[tuple[float, float]]:
    """Return (share of yes, accuracy) of each way that was asked yes or no."""
    pairs = [[_values(rows, model, way, "yes or no", name) for name in ("yes_ratio", "accuracy")] for way in ways]
    return [(statistics.fmean(yes), statistics.fmean(right)) for yes, right in pairs if yes]
