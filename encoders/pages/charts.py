"""matplotlib draws all charts in the same style. A page shows them as SVG in its own colours; they can also be saved as files.

A tip is a text that a page shows while the mouse is over a mark: `mark.set_gid(tip(...))`.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from encoders.whole_files import write_whole

if TYPE_CHECKING:  # slow to import, and not needed by commands that draw nothing
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Shapes: N = values, B = columns of a histogram.

_SHEET = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
COLOURS: dict[str, str] = dict(re.findall(r"--(\w+): light-dark\((#[0-9a-f]{6}),", _SHEET))
"""Name of a colour -> its light value; in a page, the name's value in the style sheet."""
LINES = ("blue", "orange", "green", "purple", "gold", "teal", "pink", "idle")
"""Names of the colours of lines. Further lines begin again with the first colour."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 12, "text.parse_math": False, "text.color": COLOURS["text"],
    "axes.facecolor": "none", "axes.edgecolor": COLOURS["line"], "axes.labelcolor": COLOURS["soft"], "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": COLOURS["line"], "legend.frameon": False,
    "xtick.color": COLOURS["line"], "xtick.labelcolor": COLOURS["soft"],
    "ytick.color": COLOURS["line"], "ytick.labelcolor": COLOURS["soft"],
    "lines.linewidth": 2, "lines.markersize": 5, "svg.fonttype": "none", "svg.hashsalt": "mof-vig",
}  # fmt: skip
LONGEST_NAME = 28  # characters
COLUMNS = 48  # in a histogram


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of this size in pixels. All that is drawn on it inside of the `with` has the style of the charts."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure((width / 72, height / 72), layout="constrained")


def to_svg(drawn: Figure, label: str) -> Markup:
    """Return the figure as inline SVG; the same figure gives the same text. `label` describes it for people who cannot see it."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has other fonts
        drawn.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    body = text[text.index("</metadata>") + len("</metadata>") :]
    body = re.sub(r'<g id="tip: ([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r' id="[a-z0-9]+(\.[a-z]+)?_\d+"', "", body)  # names of parts, which several charts of a page would share
    body = re.sub(r"<!--.*?-->|<style.*?</style>|<clipPath.*?</clipPath>", "", body, flags=re.DOTALL)
    body = re.sub(r' clip-path="[^"]*"', "", body)  # nothing is drawn beyond the axes
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r"\n\s*", "\n", body)
    return Markup(f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{escape(label)}">{body}')


def save(drawn: Figure, path: Path) -> None:
    """Write the figure on a white ground, as PNG or SVG by the suffix of `path`. The folder is made."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        write_whole(path, lambda temporary: drawn.savefig(temporary, dpi=150, facecolor="white"))


def tip(text: str) -> str:
    """Return the gid that makes `to_svg` write this text as the tip of a mark."""
    return f"tip: {text}"


def short(name: str) -> str:
    """Return the name, or only the end of a long name: names of folders differ there."""
    return name if len(name) <= LONGEST_NAME else "\u2026" + name[1 - LONGEST_NAME :]


# --- histograms
def column_edges(low: float, high: float, cut: float | None = None) -> NDArray[np.float64]:
    """Return [B + 1] the edges of equally wide columns from `low` to `high`, or a little further so that two columns meet at the cut."""
    low, high = (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)  # narrower columns would have equal edges
    if cut is None or not low < cut < high:
        return np.linspace(low, high, COLUMNS + 1)
    width = (high - low) / (COLUMNS - 1)  # one column more, as the first is moved to the left
    before = math.ceil((cut - low) / width)
    edges = np.linspace(cut - before * width, cut + (COLUMNS - before) * width, COLUMNS + 1)  # [B + 1]
    edges[before] = cut  # exactly, because a value often lies on it
    return edges


def counts_of(values: NDArray[np.floating], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return [B] the number of values in each column; values beyond the ends are counted in the outermost columns."""
    return np.histogram(values, np.array([-np.inf, *edges[1:-1], np.inf]))[0]


def histogram(
    values: NDArray[np.floating],
    edges: NDArray[np.float64],
    *,
    label: str,
    unit: str,
    cut: float | None = None,
    kept: str = "above",
    note: str = "",
    colour: str = "blue",
    log: bool = False,
    height: float = 250,
) -> Figure:
    """Return a histogram in which the columns on the kept side of the cut are coloured, and the others are not.

    Args:
        edges: [B + 1], from `column_edges` with the same cut.
        label: the name of the values, below the axis.
        unit: the things that are counted, such as "records".
        kept: "above" or "below".
        note: a text at the cut, or at the end of the axis that is nearer to the cut.
        log: make columns as high as the logarithm of their count + 1, so that rare values can be seen beside frequent values.
    """
    counts = counts_of(values, edges)  # [B]
    with figure(540, height) as drawn:
        axes = drawn.subplots()
        inside = np.zeros(len(counts), bool) if cut is None else edges[:-1] >= cut if kept == "above" else edges[1:] <= cut  # [B]
        colours = np.where(inside, COLOURS[colour], COLOURS["idle"])  # [B]
        bars = axes.bar(edges[:-1], counts, 0.9 * np.diff(edges), align="edge", color=colours)
        for bar, left, right, count in zip(bars, edges, edges[1:], counts, strict=False):
            bar.set_gid(tip(f"{left:.3f} to {right:.3f}: {count:,} {unit}"))
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(label)
        axes.set_ylabel(f"{unit}, log scale" if log else unit)
        _count_axis(axes, int(counts.max(initial=1)), log)
        if edges[0] < 0 < edges[-1]:
            axes.axvline(0, color=COLOURS["line"], linewidth=1, zorder=0)
        if cut is not None:
            place = min(max(cut, edges[0]), edges[-1])
            shift, side = (-5, "right") if place > (edges[0] + edges[-1]) / 2 else (5, "left")
            axes.axvline(place, color=COLOURS["text"], linewidth=1.5, linestyle=(0, (3, 2)))
            axes.annotate(note, (place, 1), (shift, 2), axes.get_xaxis_transform(), "offset points", ha=side, va="bottom")
    return drawn


def _count_axis(axes: Axes, highest: int, log: bool) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    if log:
        axes.set_yscale("function", functions=(np.log1p, np.expm1))
        step = 1 + int(math.log10(highest)) // 4
        axes.set_yticks([0, *(10**power for power in range(0, 20, step) if 10**power <= highest)])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylim(0, highest)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


# --- bars
class Bar(NamedTuple):
    """A bar is a row of a bar chart."""

    name: str
    value: float
    interval: tuple[float, float] | None
    """The 95 % confidence interval of the value, which is drawn as a line."""
    text: str
    """The text behind the bar."""
    more: str = ""
    """The text in the bar's tip, in place of `text`."""


def interval_bars(bars: Sequence[Bar], label: str, chance: float | None = None) -> Figure:
    """Return a chart with a bar from 0 for each row, the first on top; bars below 0 have another colour.

    Args:
        label: the name of the values, below the axis.
        chance: the value that guessing reaches, drawn as a line.
    """
    with figure(540, 27 * len(bars) + 64) as drawn:
        axes = drawn.subplots()
        for place, bar in enumerate(bars):
            (patch,) = axes.barh(place, bar.value, 0.72, color=COLOURS["blue" if bar.value >= 0 else "orange"])
            patch.set_gid(tip(f"{bar.name}: {bar.more or bar.text}"))
            if bar.interval is not None:
                axes.plot(bar.interval, (place, place), color=COLOURS["text"], linewidth=1.5)
            axes.annotate(bar.text, (1, place), (8, 0), axes.get_yaxis_transform(), "offset points", va="center", color=COLOURS["soft"])
        axes.set_yticks(range(len(bars)), [short(bar.name) for bar in bars], color=COLOURS["text"])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.xaxis.grid(True)
        axes.axvline(0, color=COLOURS["soft"], linewidth=1)
        if chance is not None:
            axes.axvline(chance, color=COLOURS["soft"], linewidth=1.5, linestyle=(0, (3, 2)))
            axes.annotate(f"chance {chance:g}", (chance, 1), (0, 2), axes.get_xaxis_transform(), "offset points", ha="center", va="bottom")
    return drawn
