"""A study has these charts: a bar per row, a heat map by pattern, and accuracy against the number of tokens with a loss."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.pages.charts import COLOURS, LINES, figure, save
from mof.evals.plots import plot_probe
from study.result_tables import grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = {
    "pair_accuracy": "pairs right, %",
    "question_accuracy": "questions right, %",
    "misled_accuracy": "questions after a false statement right, %",
}


MARKS = "osD^vPX*<>hd"  # a mark for each line of a chart

CHANCE = {"pair_accuracy": 25, "question_accuracy": 50, "misled_accuracy": 50}


def plot_study(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write accuracy.png and by_pattern.png into `folder` from the rows of results.json; return their paths."""
    save(accuracy_bars(rows), folder / "accuracy.png")
    table = {
        name: {pattern: 100 * statistics.fmean(row["by_pattern"][pattern] for row in same) for pattern in rows[0]["by_pattern"]}
        for name, same in grouped(rows, "name").items()
    }
    plot_probe("Held-out pairs", {"pair accuracy, %": table}, folder / "by_pattern.png")
    return [folder / "accuracy.png", folder / "by_pattern.png"]


def accuracy_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return bars of each row's right pairs, and of its right questions after a false statement where these were asked."""
    by_name = grouped(rows, "name")
    measures = [measure for measure in ("pair_accuracy", "misled_accuracy") if all(row.get(measure) is not None for row in rows)]
    with figure(160 + 400 * len(measures), 34 * len(by_name) + 100) as drawn:
        panels = drawn.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            for place, same in enumerate(by_name.values()):
                values = [100 * row[measure] for row in same]
                mean = statistics.fmean(values)
                axes.barh(place, mean, 0.72, color=COLOURS["blue"])
                if len(values) > 1:
                    axes.plot(values, [place] * len(values), "o", color=COLOURS["text"])
                axes.annotate(f"{mean:.1f}", (1, place), (8, 0), axes.get_yaxis_transform(), "offset points", va="center")
            axes.axvline(CHANCE[measure], color=COLOURS["soft"], linestyle="--", linewidth=1)
            axes.annotate("chance", (CHANCE[measure], 1), (0, 2), axes.get_xaxis_transform(), "offset points", ha="center", va="bottom")
            axes.set_xlim(0, 100)
            axes.set_xlabel(MEASURES[measure])
        tokens = {name: statistics.fmean(row["active_tokens"] for row in same) / 1000 for name, same in by_name.items()}
        labels = [f"{name}\n{by_name[name][0]['visual_tokens']} visual, {tokens[name]:.0f}k active tokens" for name in by_name]
        panels[0].set_yticks(range(len(by_name)), labels, color=COLOURS["text"])
        panels[0].invert_yaxis()
    return drawn


def plot_selection(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write selection.png into `folder` from the rows of results.json: accuracy against tokens with a loss, a line per selection.

    Return its path in a list.
    """
    with figure(330 * len(MEASURES), 330) as drawn:
        for axes, (measure, title) in zip(drawn.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
            for number, (selection, same) in enumerate(grouped(rows, "selection").items()):
                by_keep = sorted(grouped(same, "keep").items(), key=lambda item: item[0] or 0)
                points = [[(row["active_tokens"], 100 * row[measure]) for row in seeds] for _, seeds in by_keep]
                _line(axes, points, number, selection or "all tokens")
            axes.set_xlabel("answer tokens with a loss (dots: seeds)")
            axes.set_ylabel(title)
            axes.set_ylim(0, 100)
        drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    save(drawn, folder / "selection.png")
    return [folder / "selection.png"]


def plot_noise(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write charts into `folder` from the rows of results.json; return their paths.

    There is a chart of bars for each noise, such as noise-mixed.png. With several shares of ungrounded records, noise.png shows what each
    selection gains against the share.
    """
    written = []
    for noise, same in grouped(rows, "noise").items():
        written.append(folder / f"noise-{noise}.png")
        save(accuracy_bars(same), written[-1])
    ungrounded = [row for row in rows if row["noise"] != "mixed"]
    if len({row["noise"] for row in ungrounded}) > 1:
        written.append(folder / "noise.png")
        save(gains(ungrounded), written[-1])
    return written


def gains(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return a panel for all tokens and a panel for random tokens, with a line for each selection that was trained at several shares of
    noise: how many points of right pairs it gains over them with the same seed, against the share."""
    right = {(row["selection"], row["noise"], row["seed"]): 100 * row["pair_accuracy"] for row in rows}
    with figure(800, 380) as drawn:
        for axes, control in zip(drawn.subplots(1, 2, sharey=True), ("everything", "random"), strict=True):
            for number, way in enumerate(grouped(rows, "selection")):
                points = grouped(
                    [
                        {"share": 100 * float(noise), "gain": value - right[control, noise, seed]}
                        for (name, noise, seed), value in right.items()
                        if name == way != control and (control, noise, seed) in right
                    ],
                    "share",
                )
                if len(points) > 1:
                    _line(axes, [[(share, row["gain"]) for row in seeds] for share, seeds in sorted(points.items())], number, way)
            axes.axhline(0, color=COLOURS["soft"], linestyle="--", linewidth=1)
            axes.set_xlabel("ungrounded records, % (dots: seeds)")
            axes.set_ylabel(f"right pairs, points above {control}")
        handles = {label: handle for axes in drawn.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        drawn.legend(handles.values(), handles, loc="outside upper center", ncols=6)
    return drawn


def _line(axes: Axes, points: Sequence[Sequence[tuple[float, float]]], number: int, label: str) -> None:
    """Draw a line through the means of points, each of which is a list of (x, y) with an entry for each seed; and a dot for each seed."""
    colour, mark = COLOURS[LINES[number % len(LINES)]], MARKS[number % len(MARKS)]
    style = "-" if number < len(LINES) else "--"  # the colours come a second time
    means = [[statistics.fmean(values) for values in zip(*seeds, strict=True)] for seeds in points]
    axes.plot(*zip(*means, strict=True), label=label, color=colour, marker=mark, linestyle=style)
    axes.plot(*zip(*itertools.chain(*points), strict=True), ".", color=colour, alpha=0.4)
