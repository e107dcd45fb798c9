"""Probes are drawn as heat maps of encoders by pattern, and as lines along the layers or along the patterns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from encoders.pages.charts import COLOURS, LINES, figure, save, short, tip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Mapping[str, Mapping[str, float]]
"""Name -> {pattern: value}"""


def plot_probe(title: str, tables: Mapping[str, Rows], path: Path) -> None:
    """Write a heat map for each label -> name -> {type: value in 0..100}, one below the other, PNG or SVG by the suffix of `path`.

    Args:
        title: the title of the whole. The labels stand above their maps, and beside the colours.
    """
    heights = [30 * len(rows) + 130 for rows in tables.values()]
    columns = max(len(row) for rows in tables.values() for row in rows.values())
    with figure(68 * columns + 250, sum(heights) + 40) as drawn:
        drawn.suptitle(title, x=0.01, ha="left", fontsize=14)
        panels = drawn.subplots(len(tables), height_ratios=heights, squeeze=False)[:, 0]
        for axes, (label, rows) in zip(panels, tables.items(), strict=True):
            types = list(next(iter(rows.values())))
            image = axes.imshow([list(row.values()) for row in rows.values()], cmap="viridis", vmin=0, vmax=100, aspect="auto")
            axes.set_xticks(range(len(types)), types, rotation=30, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(rows)), list(rows), color=COLOURS["text"])
            for y, row in enumerate(rows.values()):
                for x, value in enumerate(row.values()):
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="black" if value > 55 else "white")
            axes.set_title(label, loc="left", fontsize=12)
            drawn.colorbar(image, ax=axes, label="cosine x 100" if "cosine" in label else "%")
            axes.set_xlabel("visual pattern")
    save(drawn, path)


def plot_layers(probes: Mapping[str, Rows], path: Path) -> None:
    """Write a chart for each encoder -> layer -> {pattern: right pairs in %}: a line for each pattern along the layers, PNG or SVG."""
    with figure(720, 330 * len(probes) + 60) as drawn:
        panels = drawn.subplots(len(probes), squeeze=False)[:, 0]
        for axes, (encoder, rows) in zip(panels, probes.items(), strict=True):
            for number, pattern in enumerate(next(iter(rows.values()))):
                average = pattern == "average"
                style = {"color": COLOURS["text"], "linewidth": 3} if average else {"color": f"C{number}"}
                axes.plot(list(rows), [row[pattern] for row in rows.values()], "o-", label=pattern, **style)
            axes.axhline(25, color=COLOURS["text"], linestyle=":", linewidth=1)  # chance
            axes.set(xlabel="layer", ylabel="right pairs, %", ylim=(-3, 103))
            axes.set_title(encoder, loc="left", fontsize=12)
            axes.yaxis.grid(True)
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside right upper")
    save(drawn, path)


def pattern_lines(lines: Rows, dashed: Collection[str]) -> Figure:
    """Return a chart of shares in [0, 1] by pattern, a line per name; a line passes over patterns that it lacks."""
    patterns = list(dict.fromkeys(pattern for shares in lines.values() for pattern in shares))
    with figure(720, 400 + 9 * len(lines)) as drawn:
        axes = drawn.subplots()
        for number, (name, shares) in enumerate(lines.items()):
            colour = COLOURS[LINES[number % len(LINES)]]
            points = [(place, 100 * shares[pattern], pattern) for place, pattern in enumerate(patterns) if pattern in shares]
            style = "--" if name in dashed else "-"
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], style, color=colour, label=short(name))
            for x, y, pattern in points:
                (dot,) = axes.plot(x, y, "o", color=colour)
                dot.set_gid(tip(f"{name}, {pattern}: {y:.1f} %"))
        axes.set_xticks(range(len(patterns)), patterns, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_ylim(-3, 103)
        axes.set_ylabel("right pairs, %")
        axes.yaxis.grid(True)
        drawn.legend(loc="outside upper left", ncols=2)
    return drawn


def plot_patterns(models: Rows, encoders: Rows, path: Path) -> None:
    """Write `pattern_lines` of models and encoders, the encoders dashed; PNG or SVG by the suffix of `path`."""
    save(pattern_lines({**encoders, **models}, encoders), path)
