"""Charts of a study: a bar per row, a heat map by pattern, and accuracy against the number of tokens with a loss."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from encoders.pages.charts import COLOURS, LINES, figure, save
from mof.evals.plots import plot_probe

MEASURES = {
    "pair_accuracy": "pairs right, %",
    "question_accuracy": "questions right, %",
    "misled_accuracy": "... after a false statement, %",
}


def plot_study(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write pair_accuracy.png and by_pattern.png into `folder` from the rows of results.json; return their paths."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    seeds = max(len(same) for same in by_name.values())
    with figure(720, 30 * len(by_name) + 100) as drawn:
        axes = drawn.subplots()
        for place, same in enumerate(by_name.values()):
            values = [100 * row["pair_accuracy"] for row in same]
            axes.barh(place, statistics.fmean(values), 0.72, color=COLOURS["blue"])
            axes.plot(values, [place] * len(values), "o", color=COLOURS["text"])
            tokens = f"{same[0]['visual_tokens']} visual tokens"
            axes.annotate(tokens, (1, place), (8, 0), axes.get_yaxis_transform(), "offset points", va="center", color=COLOURS["soft"])
        axes.axvline(25, color=COLOURS["soft"], linestyle="--", linewidth=1)
        axes.annotate("chance", (25, 1), (0, 2), axes.get_xaxis_transform(), "offset points", ha="center", va="bottom")
        axes.set_yticks(range(len(by_name)), list(by_name), color=COLOURS["text"])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"pair accuracy on held-out pairs, % (bar: mean of {seeds} seeds; dots: seeds)")
    save(drawn, folder / "pair_accuracy.png")
    table = {
        name: {pattern: 100 * statistics.fmean(row["by_pattern"][pattern] for row in same) for pattern in rows[0]["by_pattern"]}
        for name, same in by_name.items()
    }
    plot_probe("Held-out pairs", {"pair accuracy, %": table}, folder / "by_pattern.png")
    return [folder / "pair_accuracy.png", folder / "by_pattern.png"]


def plot_selection(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write selection.png into `folder` from the rows of results.json: accuracy against tokens with a loss, a line per selection.

    Return its path in a list.
    """
    with figure(330 * len(MEASURES), 330) as drawn:
        for axes, (measure, label) in zip(drawn.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
            for number, selection in enumerate(dict.fromkeys(row["selection"] for row in rows)):
                by_keep: dict[float, list[tuple[float, float]]] = {}  # (tokens, accuracy) of every seed
                for row in rows:
                    if row["selection"] == selection:
                        by_keep.setdefault(row["keep"] or 0.0, []).append((row["active_tokens"], 100 * row[measure]))
                means = [[statistics.fmean(values) for values in zip(*by_keep[keep], strict=True)] for keep in sorted(by_keep)]
                colour = COLOURS[LINES[number]]
                axes.plot(*zip(*means, strict=True), label=selection or "all tokens", color=colour, marker="osD^vP"[number])
                axes.plot(*zip(*itertools.chain(*by_keep.values()), strict=True), ".", color=colour, alpha=0.4)
            axes.set_xlabel("answer tokens with a loss (dots: seeds)")
            axes.set_ylabel(label)
            axes.set_ylim(0, 100)
        drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    save(drawn, folder / "selection.png")
    return [folder / "selection.png"]
