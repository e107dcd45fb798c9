"""How sure a benchmark's figure is: 95 % intervals by resampling its units (pairs, photos, captions), and Wilson's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# Shapes: U = units, C = counts of a unit, R = resamples, P = resamples at a time.

RESAMPLES, PIECE = 10_000, 500
SEED = 0
Z = 1.959964  # of a 95 % interval
Counts = NDArray[np.float64]
Statistic = Callable[[Counts], Counts]
"""Counts summed over units [..., C] -> the figure [...]."""
Interval = tuple[float, float]


def share(counts: Counts) -> Counts:
    """(hits, of how many) [..., 2] -> [...]; NaN for none of none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts[..., 0] / counts[..., 1]  # [...]


@dataclass(frozen=True)
class Tally:
    """A figure made of the sums of its units' counts. Units are what is drawn independently: questions about one photo are not."""

    units: tuple[str, ...]
    """What each unit is, in words that differ where the questions do: tallies are compared only where all these agree."""
    counts: Counts
    """[U, C]"""
    statistic: Statistic = share

    @property
    def value(self) -> float:
        return float(self.statistic(self.counts.sum(axis=0)))

    @cached_property
    def resampled(self) -> Counts:
        """The figure on units drawn with replacement [R]. Tallies of as many units draw the same ones, so their figures are paired."""
        rng = np.random.default_rng(SEED)
        count = len(self.units)
        even = np.full(count, 1 / count)  # [U]
        draws = (rng.multinomial(count, even, size=PIECE).astype(np.float64) for _ in range(RESAMPLES // PIECE))  # each [P, U]
        return np.concatenate([self.statistic(times @ self.counts) for times in draws])  # [R]


@dataclass(frozen=True)
class Given:
    """A figure that somebody else computed, and its standard error if known."""

    value: float
    error: float | None = None


Figure = Tally | Given


def mean_interval(runs: Sequence[Figure]) -> Interval | None:
    """Of the mean over runs on the same units, by the bootstrap; None where the units differ or are not known.

    Of runs that have all or nothing right, Wilson's: resampling would claim certainty.
    """
    if len(runs) == 1 and isinstance(runs[0], Given):
        value, error = runs[0].value, runs[0].error
        return None if error is None else (value - Z * error, value + Z * error)
    tallies = _on_same_units(runs)
    if tallies is None:
        return None
    low, high = _percentiles(_mean(tallies))
    if low == high and low in (0, 1):
        count = len(tallies[0].units)
        return wilson(round(low * count), count)
    return low, high


@dataclass(frozen=True)
class Difference:
    """Between two models on the same units."""

    value: float
    interval: Interval
    """Paired: both are resampled together, so that easy and hard units do not blur it."""


def difference(first: Sequence[Figure], second: Sequence[Figure]) -> Difference | None:
    """First minus second, each the mean of its runs; None where they were not measured on the same units."""
    tallies = _on_same_units([*first, *second])
    if tallies is None:
        return None
    ours, theirs = tallies[: len(first)], tallies[len(first) :]
    value = float(np.mean([one.value for one in ours]) - np.mean([one.value for one in theirs]))
    return Difference(value, _percentiles(_mean(ours) - _mean(theirs)))


def _on_same_units(runs: Sequence[Figure]) -> list[Tally] | None:
    tallies = [one for one in runs if isinstance(one, Tally)]
    return tallies if len(tallies) == len(runs) and len({one.units for one in tallies}) == 1 else None


def _mean(tallies: Sequence[Tally]) -> Counts:
    return np.mean([one.resampled for one in tallies], axis=0)  # [R]


def _percentiles(figures: Counts) -> Interval:
    low, high = np.nanquantile(figures, (0.025, 0.975))
    return float(low), float(high)


def wilson(hits: int, trials: int) -> Interval:
    """Wilson's score interval of a share."""
    centre = (hits + Z**2 / 2) / (trials + Z**2)
    reach = Z * math.sqrt(hits * (trials - hits) / trials + Z**2 / 4) / (trials + Z**2)
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def half_width(share: float, units: int) -> float:
    """How far a share of so many units may be off at 95 %: 0.069 for 0.25 of MMVP's 150 pairs."""
    return Z * math.sqrt(share * (1 - share) / units)
