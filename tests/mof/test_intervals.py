"""Intervals against all resamples written out, brute force and values computed by hand."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from mof.evals.intervals import Given, Tally, difference, half_width, mean_interval, wilson


def tally(right: list[int], names: str = "question") -> Tally:
    return Tally(tuple(f"{names} {i}" for i in range(len(right))), np.array([(hit, 1) for hit in right], float))


def test_small_samples_against_all_resamples() -> None:
    """5 units have 5^5 resamples, all as likely."""
    counts = np.array([(1, 2), (0, 1), (2, 2), (1, 3), (0, 2)], float)  # a ratio: CHAIR's mentions
    shares = [counts[list(draw)].sum(axis=0) for draw in itertools.product(range(5), repeat=5)]
    exact = np.sort([hits / of for hits, of in shares])
    interval = mean_interval([Tally(tuple("abcde"), counts)])
    assert interval is not None
    for got, quantile in zip(interval, (0.025, 0.975), strict=True):
        near = np.quantile(exact, (quantile - 0.006, quantile + 0.006))  # 4 standard errors of 10,000 resamples
        assert near[0] <= got <= near[1]


def test_pairs_against_brute_force() -> None:
    rng = random.Random(7)
    right = [int(rng.random() < 0.3) for _ in range(150)]
    means = sorted(sum(rng.choices(right, k=150)) / 150 for _ in range(4000))
    interval = mean_interval([tally(right)])
    assert interval == pytest.approx((means[100], means[3899]), abs=0.012)
    assert interval == mean_interval([tally(right)])  # the same each time
    share = sum(right) / 150
    assert (interval[1] - interval[0]) / 2 == pytest.approx(half_width(share, 150), abs=0.01)


def test_pairing_removes_what_questions_share() -> None:
    """Models that differ on 6 of 100 pairs, all to the advantage of the first."""
    first = [1] * 60 + [0] * 40
    second = [1] * 54 + [0] * 46
    between = difference([tally(first)], [tally(second)])
    assert between is not None and between.value == pytest.approx(0.06)
    rng = random.Random(1)
    brute = []
    for _ in range(4000):
        draw = rng.choices(range(100), k=100)
        brute.append(sum(first[i] - second[i] for i in draw) / 100)
    brute.sort()
    assert between.interval == pytest.approx((brute[100], brute[3899]), abs=0.011)
    assert between.interval[0] > 0  # although either one's interval holds the other's value
    low, _ = mean_interval([tally(first)]) or (1, 1)
    assert low < 0.54
    assert difference([tally(first)], [tally(first)]).interval == (0, 0)


def test_runs_of_several_seeds_are_averaged_on_the_same_units() -> None:
    runs = [tally([1, 1, 0, 0] * 20), tally([1, 0, 0, 1] * 20)]
    interval = mean_interval(runs)
    joined = mean_interval([Tally(runs[0].units, np.array([(n, 2) for n in [2, 1, 0, 1] * 20], float))])
    assert interval == pytest.approx(joined)
    assert difference(runs, [tally([0] * 80)]).value == 0.5


def test_other_units_are_not_compared() -> None:
    ours, theirs = tally([1, 0, 1]), tally([1, 0, 1], "riddle")
    assert difference([ours], [theirs]) is None and mean_interval([ours, theirs]) is None
    assert difference([ours], [Given(0.5)]) is None and difference([ours], [tally([1, 0])]) is None


def test_all_or_nothing_right_is_not_certain() -> None:
    assert mean_interval([tally([0] * 10)]) == wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert mean_interval([tally([1] * 10)]) == wilson(10, 10) == pytest.approx((0.72247, 1), abs=1e-5)


def test_wilson_and_the_normal_width() -> None:
    assert wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert half_width(0.25, 150) == pytest.approx(0.0693, abs=1e-4)


def test_given_figures_have_the_interval_of_their_error() -> None:
    assert mean_interval([Given(0.5, 0.1)]) == pytest.approx((0.304, 0.696), abs=1e-3)
    assert mean_interval([Given(0.5)]) is None and mean_interval([Given(0.5, 0.1), Given(0.6, 0.1)]) is None
