"""Charts as plain numbers between 0 and 1, which the page's template draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vig.means import Mean

# Shapes: N = values, B = bins.

BINS = 48


@dataclass(frozen=True)
class Axis:
    """A stretch of nats."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end; what lies beyond an end is put there."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Place and label of round numbers, some five of them."""
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(self.place(k * step), f"{k * step:.{decimals}f}".replace("-", "\u2212")) for k in range(first, last + 1)]


def axis_of(values: NDArray[np.floating], edge: float | None = None) -> Axis:
    """Wide enough for all values but the outermost two in a thousand, and for 0.

    Args:
        edge: where two columns of a histogram are to meet, if it is on the axis.
    """
    low, high = np.quantile(values, [0.001, 0.999]).tolist()
    low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.02 * (high - low) or 0.5
    low, high = low - margin, high + margin
    if edge is not None and low < edge < high:
        width = (high - low) / (BINS - 1)  # one column more, as the first is moved to the left
        low = edge - math.ceil((edge - low) / width) * width
        high = low + BINS * width
    return Axis(low, high)


@dataclass(frozen=True)
class Bin:
    """One column of a histogram."""

    left: float
    """Place of its left edge."""
    width: float
    height: float
    """1 for the highest; proportional to the count, or to its logarithm."""
    kept: bool
    """Whether it begins at the threshold or above."""
    label: str


@dataclass(frozen=True)
class Histogram:
    """How many values lie where; those beyond the ends of the axis are counted in the outermost columns."""

    title: str
    axis: Axis
    bins: list[Bin]
    highest: int
    """How many values the highest column counts."""
    unit: str
    log: bool
    mean: Mean
    threshold: float | None
    """In nats, drawn where there is one."""
    reach: float
    """Share of the values that reach the threshold."""


def histogram(title: str, values: NDArray[np.floating], axis: Axis, threshold: float | None, unit: str, *, log: bool = False) -> Histogram:
    """Of at least one value.

    Args:
        unit: what is counted, such as "records".
        log: columns as high as the logarithm of their count + 1, so that rare values show beside very frequent ones.
    """
    threshold = threshold if threshold is not None and math.isfinite(threshold) else None
    edges = np.linspace(axis.low, axis.high, BINS + 1)  # [B + 1]
    if threshold is not None and axis.low < threshold < axis.high:
        edges[round(axis.place(threshold) * BINS)] = threshold  # to the bit, as some value always lies on it
    counts = np.histogram(values.astype(np.float64).clip(axis.low, axis.high), edges)[0]  # [B]
    heights = np.log1p(counts) if log else counts  # [B]
    heights = heights / heights.max()  # [B]
    bins = []
    for i, count in enumerate(counts.tolist()):
        left, right = float(edges[i]), float(edges[i + 1])
        kept = threshold is not None and left >= threshold
        bins.append(Bin(i / BINS, 1 / BINS, float(heights[i]), kept, f"{left:.3f} to {right:.3f} nats: {count:,} {unit}"))
    reach = 0.0 if threshold is None else float((values >= threshold).mean())
    return Histogram(title, axis, bins, int(counts.max()), unit, log, Mean.of(values), threshold, reach)


@dataclass(frozen=True)
class BarChart:
    """A bar per group: its mean, and where the mean lies with 95 % confidence."""

    axis: Axis
    rows: list[tuple[str, Mean]]

    def interval(self, mean: Mean) -> tuple[float, float]:
        """Places of the two ends."""
        error = 1.96 * (mean.error or 0.0)
        return self.axis.place(mean.mean - error), self.axis.place(mean.mean + error)


def bar_chart(means: Mapping[str, Mean]) -> BarChart:
    """The highest mean first. Of at least one group."""
    rows = sorted(means.items(), key=lambda row: (-row[1].mean, row[0]))
    return BarChart(axis_of(np.array(_ends(list(means.values())))), rows)


def _ends(means: Sequence[Mean]) -> list[float]:
    return [mean.mean + sign * 1.96 * (mean.error or 0.0) for mean in means for sign in (-1, 1)]
