"""Pictures of a study: one bar per row, and one panel per pattern. Needs the extra `plots`."""

from __future__ import annotations

import itertools
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def require_matplotlib() -> None:
    """ValueError when it is not installed: worth knowing before hours of training."""
    if find_spec("matplotlib") is None:
        raise ValueError('plots need matplotlib: pip install "mof-vig[plots]"')


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


def plot_probe(tables: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Write heat maps of label -> name -> {type: value in 0..100}, one below the other, PNG or SVG by the suffix of `path`.

    Raises:
        ValueError: when matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    heights = [0.42 * len(rows) + 1.9 for rows in tables.values()]
    width = max(len(columns) for rows in tables.values() for columns in rows.values())
    figure = Figure(figsize=(0.95 * width + 2.4, sum(heights)), layout="constrained")
    panels = figure.subplots(len(tables), height_ratios=heights, squeeze=False)[:, 0]
    for axes, (label, rows) in zip(panels, tables.items(), strict=True):
        draw_heat_map(axes, list(rows), list(next(iter(rows.values()))), [list(values.values()) for values in rows.values()], label)
    figure.savefig(path, dpi=150)


def plot_patterns(models: dict[str, dict[str, float]], encoders: dict[str, dict[str, float]], path: Path) -> None:
    """Write name -> {pattern: share in [0, 1]} as a line per name, encoders dashed; PNG or SVG by the suffix of `path`.

    Raises:
        ValueError: when matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = encoders | models
    patterns = list(dict.fromkeys(pattern for by in lines.values() for pattern in by))
    figure = Figure(figsize=(0.95 * len(patterns) + 2.4, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, by in lines.items():
        places = [place for place, pattern in enumerate(patterns) if pattern in by]
        style = "--" if name in encoders else "-"
        axes.plot(places, [100 * by[patterns[place]] for place in places], style, marker="o", label=name)
    axes.set_xticks(range(len(patterns)), patterns, rotation=30, ha="right")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("right pairs, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def heat_map(names: list[str], columns: list[str], table: list[list[float]], label: str) -> Any:
    """A figure: one row per name, values in 0..100 written into their cells."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.95 * len(columns) + 2.4, 0.42 * len(names) + 1.9), layout="constrained")
    draw_heat_map(figure.subplots(), names, columns, table, label)
    return figure


def draw_heat_map(axes: Any, names: list[str], columns: list[str], table: list[list[float]], label: str) -> None:
    """The same on axes of matplotlib."""
    image = axes.imshow(table, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for y, values in enumerate(table):
        for x, value in enumerate(values):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=9, color="black" if value > 55 else "white")
    axes.figure.colorbar(image, ax=axes, label=label)
