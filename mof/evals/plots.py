"""Pictures of probes: heat maps of encoders by pattern, and lines of encoders and models along the patterns. Needs the extra `plots`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def require_matplotlib() -> None:
    """ValueError when it is not installed: worth knowing before hours of training."""
    if find_spec("matplotlib") is None:
        raise ValueError('plots need matplotlib: pip install "mof-vig[plots]"')


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
