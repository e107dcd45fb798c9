"""Drawings of a report as inline SVG. Colours are classes that the page's style sheet sets, for light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from mof.evals.report import Cell

COLOURS = 8  # classes c0, c1, ... of the style sheet; then they begin again
ROW, TOP, LABEL = 26, 8, 200  # pixels
WIDTH = 640
AXIS = 34  # pixels below a drawing


def interval_chart(title: str, cells: Mapping[str, Cell], chance: float | None) -> str:
    """One row per model: a dot, and a line over its interval. Chance, if any, in the unit of the cells."""
    ends = [end for cell in cells.values() for end in (cell.interval or ())]
    values = [*ends, *(cell.value for cell in cells.values()), 0.0, *([] if chance is None else [chance])]
    ticks = _ticks(min(values), max(values))
    bottom = TOP + ROW * len(cells)

    def x(value: float) -> float:
        return LABEL + (WIDTH - LABEL - 60) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [_grid(x(tick), f"{tick:g}", bottom) for tick in ticks]
    if chance is not None:
        parts.append(f'<line class="chance" x1="{x(chance):.1f}" x2="{x(chance):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(_text(x(chance), bottom + 28, f"chance {chance:g}", "middle", "muted"))
    for number, (model, cell) in enumerate(cells.items()):
        y = TOP + ROW * (number + 0.5)
        if cell.interval is not None:
            low, high = cell.interval
            parts.append(f'<line class="c0 reach" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}"/>')
        tip = f"<title>{escape(model)}: {escape(cell.text)}</title>"
        parts.append(f'<circle class="c0 dot" cx="{x(cell.value):.1f}" cy="{y}" r="5">{tip}</circle>')
        parts.append(_text(LABEL - 10, y + 4, _short(model), "end", ""))
        parts.append(_text(WIDTH - 4, y + 4, f"{cell.value:.1f}", "end", "number"))
    return _svg(title, bottom + AXIS, parts)


def pattern_chart(title: str, patterns: Sequence[str], lines: Mapping[str, Mapping[str, float]], dashed: Sequence[str]) -> str:
    """Shares in [0, 1] by pattern, a line per name; it passes over patterns that it lacks."""
    left, right, bottom = 80, WIDTH - 30, 250
    step = (right - left) / max(len(patterns) - 1, 1)

    def y(share: float) -> float:
        return bottom - (bottom - TOP - 6) * share

    parts = []
    for tick in (0, 25, 50, 75, 100):
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(tick / 100):.1f}" y2="{y(tick / 100):.1f}"/>')
        parts.append(_text(left - 8, y(tick / 100) + 4, str(tick), "end", "muted"))
    for place, pattern in enumerate(patterns):
        at = left + step * place
        parts.append(
            f'<text class="muted" text-anchor="end" transform="translate({at:.1f} {bottom + 16}) rotate(-30)">{escape(pattern)}</text>'
        )
    for number, (name, shares) in enumerate(lines.items()):
        colour = f"c{number % COLOURS}"
        there = [(place, pattern) for place, pattern in enumerate(patterns) if pattern in shares]
        points = [(left + step * place, y(shares[pattern])) for place, pattern in there]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="{colour} line{" dashed" if name in dashed else ""}" points="{path}"/>')
        for (px, py), (_, pattern) in zip(points, there, strict=True):
            tip = f"<title>{escape(name)}, {escape(pattern)}: {100 * shares[pattern]:.1f} %</title>"
            parts.append(f'<circle class="{colour} dot" cx="{px:.1f}" cy="{py:.1f}" r="3.5">{tip}</circle>')
    return _svg(title, bottom + 90, parts)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    step = next((step for step in (1, 2, 5, 10, 20, 25, 50, 100) if (high - low) / step <= 6), (high - low) / 5)
    first = step * (low // step)
    count = 1
    while first + step * count < high:
        count += 1
    return [first + step * place for place in range(count + 1)]


def _grid(x: float, words: str, bottom: float) -> str:
    return f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>' + _text(x, bottom + 14, words, "middle", "muted")


def _text(x: float, y: float, words: str, anchor: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _short(name: str) -> str:
    """Its end: names of folders differ there."""
    return name if len(name) <= 28 else "…" + name[-27:]


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">\n{inside}\n</svg>'
