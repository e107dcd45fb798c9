"""Pictures of a study: one bar per row, and one panel per pattern. Needs the extra `plots`."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from mof.evals.plots import heat_map, require_matplotlib


def plot_study(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write pair_accuracy.png and by_pattern.png into `folder` from the rows of results.json; returns their paths.

    Raises:
        ValueError: when matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    names = list(by_name)
    seeds = max(len(same) for same in by_name.values())

    figure = Figure(figsize=(8, 0.42 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        values = [100 * row["pair_accuracy"] for row in by_name[name]]
        axes.barh(place, statistics.fmean(values), color="#7aa6c2")
        axes.plot(values, [place] * len(values), "o", color="#1d3b4f", markersize=4)
        tokens = f"{by_name[name][0]['visual_tokens']} visual tokens"
        axes.text(99, place, tokens, va="center", ha="right", fontsize=8, color="#1d3b4f")
    axes.axvline(25, color="grey", linestyle="--", linewidth=1)
    axes.text(25.5, -0.45, "chance", color="grey", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"pair accuracy on held-out pairs, % (bar: mean of {seeds} seeds; dots: seeds)")
    overall = folder / "pair_accuracy.png"
    figure.savefig(overall, dpi=150)

    patterns = list(rows[0]["by_pattern"])
    table = [[100 * statistics.fmean(row["by_pattern"][pattern] for row in by_name[name]) for pattern in patterns] for name in names]
    figure = heat_map(names, patterns, table, "pair accuracy, %")
    detail = folder / "by_pattern.png"
    figure.savefig(detail, dpi=150)
    return [overall, detail]


MEASURES = {
    "pair_accuracy": "pairs right, %",
    "question_accuracy": "questions right, %",
    "misled_accuracy": "... after a false statement, %",
}


def plot_selection(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write selection.png into `folder` from the rows of results.json: accuracy against tokens with a loss, a line per way to select.

    Raises:
        ValueError: when matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(4.2 * len(MEASURES), 4.2), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for number, way in enumerate(dict.fromkeys(row["selection"] for row in rows)):
            by_keep: dict[float, list[tuple[float, float]]] = {}  # (tokens, accuracy) of every seed
            for row in rows:
                if row["selection"] == way:
                    by_keep.setdefault(row["keep"] or 0.0, []).append((row["active_tokens"], 100 * row[measure]))
            means = [[statistics.fmean(one) for one in zip(*by_keep[keep], strict=True)] for keep in sorted(by_keep)]
            axes.plot(*zip(*means, strict=True), label=way or "all tokens", color=f"C{number}", marker="osD^vP"[number])
            axes.plot(*zip(*itertools.chain(*by_keep.values()), strict=True), ".", color=f"C{number}", alpha=0.4)
        axes.set_xlabel("answer tokens with a loss (dots: seeds)")
        axes.set_ylabel(label)
        axes.set_ylim(0, 100)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=9)
    path = folder / "selection.png"
    figure.savefig(path, dpi=150)
    return [path]
