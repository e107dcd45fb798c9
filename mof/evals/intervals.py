"""A benchmark's figures get 95 % intervals, by resampling the units (pairs, photos, captions) or by Wilson's rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, bootstrap, norm

# Shapes: U = units, C = counts of a unit, R = resamples, P = resamples at a time.

RESAMPLES, PIECE = 10_000, 500
SEED = 0
LEVEL = 0.95
Z = float(norm.ppf((1 + LEVEL) / 2))
Counts = NDArray[np.float64]
Statistic = Callable[[Counts], Counts]
"""Counts summed over units [..., C] -> the figure [...]."""
Interval = tuple[float, float]


def share(counts: Counts) -> Counts:
    """Return the ratio [...] of hits and trials [..., 2]; NaN without trials."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts[..., 0] / counts[..., 1]  # [...]


@dataclass(frozen=True)
class Tally:
    """A tally is a figure of counts summed over units. Units are drawn independently; all questions about a photo are a unit."""

    units: tuple[str, ...]
    """A description of each unit, different for different questions: tallies are compared only if all descriptions agree."""
    counts: Counts
    """[U, C]"""
    statistic: Statistic = share

    @classmethod
    def of(cls, units: Sequence[str], hits: ArrayLike, trials: ArrayLike) -> Tally:
        """Return the share of hits among trials. Both have a number for each unit, or a single number for all."""
        counts = np.empty((len(units), 2))  # [U, 2]
        counts[:, 0], counts[:, 1] = hits, trials
        return cls(tuple(units), counts)

    def among(self, units: Collection[str]) -> Tally:
        """Return the tally of those units that are among `units`."""
        wanted = set(units)
        kept = [unit in wanted for unit in self.units]
        return self if all(kept) else replace(self, units=tuple(compress(self.units, kept)), counts=self.counts[kept])

    @property
    def value(self) -> float:
        return float(self.statistic(self.counts.sum(axis=0)))

    @cached_property
    def resampled(self) -> Counts:
        """Return the figure on units drawn with replacement, [R]. Tallies of equally many units draw the same units, so they are paired."""
        if len(self.units) == 1:  # can only be drawn again
            return np.full(RESAMPLES, self.value)

        def figure(drawn: NDArray[np.int64], axis: int) -> Counts:
            return self.statistic(self.counts[drawn].sum(axis=axis - 1))  # [P, U] -> [P]

        # Our figures are made of several counts, so scipy draws the units' numbers.
        units = (np.arange(len(self.units)),)
        return bootstrap(units, figure, n_resamples=RESAMPLES, batch=PIECE, method="percentile", rng=SEED).bootstrap_distribution


@dataclass(frozen=True)
class Given:
    """Given holds a figure that another program computed, and its standard error if known."""

    value: float
    error: float | None = None


Figure = Tally | Given


def mean_interval(runs: Sequence[Figure]) -> Interval | None:
    """Return the bootstrap interval of the mean over runs on the same units; None if the units differ or are unknown.

    Runs that have everything right or everything wrong get Wilson's interval: resampling would claim certainty.
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
    """Difference holds the difference between two models on the same units."""

    value: float
    interval: Interval
    """Both models are resampled together, so that easy and hard units do not widen the interval."""


def difference(first: Sequence[Figure], second: Sequence[Figure]) -> Difference | None:
    """Return the mean of the first runs minus the mean of the second; None if they were not measured on the same units."""
    tallies = _on_same_units([*first, *second])
    if tallies is None:
        return None
    ours, theirs = tallies[: len(first)], tallies[len(first) :]
    value = float(np.mean([tally.value for tally in ours]) - np.mean([tally.value for tally in theirs]))
    return Difference(value, _percentiles(_mean(ours) - _mean(theirs)))


def _on_same_units(runs: Sequence[Figure]) -> list[Tally] | None:
    tallies = [run for run in runs if isinstance(run, Tally)]
    return tallies if len(tallies) == len(runs) and len({tally.units for tally in tallies}) == 1 else None


def _mean(tallies: Sequence[Tally]) -> Counts:
    return np.mean([tally.resampled for tally in tallies], axis=0)  # [R]


def _percentiles(figures: Counts) -> Interval:
    low, high = np.nanquantile(figures, (0.025, 0.975))
    return float(low), float(high)


def wilson(hits: int, trials: int) -> Interval:
    """Return Wilson's score interval of a share."""
    interval = binomtest(hits, trials).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def half_width(share: float, units: int) -> float:
    """Return half of the 95 % interval of a share of this many units: 0.069 for 0.25 of MMVP's 150 pairs."""
    return Z * (share * (1 - share) / units) ** 0.5
