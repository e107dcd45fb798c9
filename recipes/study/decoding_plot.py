"""A chart of `compare_decoding.py`: pairs by method, and yes-or-no accuracy against the share of yes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encoders.pages.charts import COLOURS, LINES, figure, save

Rows = Sequence[Mapping[str, Any]]


def plot_decoding(rows: Rows, file: Path) -> None:
    """Write the chart: on the left a point for each model and method, on the right yes-or-no questions, with the controls as a line."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    greedy = [way for way in dict.fromkeys(row["way"] for row in rows) if not way.startswith(("yes", "sampled"))]
    with figure(1000, 90 + 22 * len(greedy)) as drawn:
        pairs, told = drawn.subplots(1, 2)
        for number, model in enumerate(models):
            colour = COLOURS[LINES[number]]
            for place, way in enumerate(greedy):
                values = _values(rows, model, way, "pairs", "accuracy")
                pairs.plot(values, [place] * len(values), ".", color=colour, alpha=0.4)
                pairs.plot(statistics.fmean(values), place, "o", color=colour, label=model if place == 0 else None)
            pairs.axvline(statistics.fmean(_values(rows, model, "greedy", "pairs", "accuracy")), color=colour, linewidth=1, alpha=0.6)
            told.plot(*zip(*_control(rows, model), strict=True), color=colour, linewidth=1.5, alpha=0.6)
            for way in greedy:
                told.plot(*_point(rows, model, way), "o" if ":" not in way else ".", color=colour)
            told.plot(*_point(rows, model, "greedy"), "s", color=colour, markersize=9, markerfacecolor="none")
        pairs.set_yticks(range(len(greedy)), greedy, color=COLOURS["text"])
        pairs.invert_yaxis()
        pairs.set_xlabel("pairs right, % (lines: greedy; small dots: seeds)")
        told.set_xlabel("answers that are yes, %")
        told.set_ylabel("yes-or-no questions right, %")
        told.set_title("line: a constant on the yes logit; square: greedy; dots: methods", fontsize=11)
        drawn.legend(*pairs.get_legend_handles_labels(), loc="outside upper center", ncols=3)
        save(drawn, file)


def _values(rows: Rows, model: str, way: str, measure: str, name: str) -> list[float]:
    return [100 * row[measure][name] for row in rows if (row["model"], row["way"]) == (model, way) and measure in row]


def _point(rows: Rows, model: str, way: str) -> tuple[float, float]:
    yes, accuracy = (statistics.fmean(_values(rows, model, way, "yes or no", name)) for name in ("yes_ratio", "accuracy"))
    return yes, accuracy


def _control(rows: Rows, model: str) -> list[tuple[float, float]]:
    """Return the points of greedy decoding with constants on the yes logit, sorted by the share of yes."""
    ways = dict.fromkeys(row["way"] for row in rows if row["way"] == "greedy" or row["way"].startswith(("yes +", "yes -")))
    return sorted(_point(rows, model, way) for way in ways)
