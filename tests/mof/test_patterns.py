"""Names of the nine patterns, and correlations against numpy."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from mof.evals.patterns import PATTERNS, by_type, correlate, pattern_type
from mof.evals.published import MMVP_CORRELATION, MMVP_VLM


def test_names() -> None:
    spelled = {
        "Camera_Perspective": "Camera Perspective", "camera  perspective": "Camera Perspective", "od": "Orientation",
        "Positional and Relational Context": "Spatial", "pr": "Spatial", "pf": "Presence", "ca": "Color",
        "structural characteristics": "Structural Character", "Texts": "Text", "my own": "my own",
    }  # fmt: skip
    assert {name: pattern_type(name) for name in spelled} == spelled
    with pytest.raises(ValueError, match="od, Orientation"):
        by_type({"od": 0.5, "Orientation": 0.1})


@pytest.mark.data
def test_the_categories_of_the_real_file(shared_data: Path) -> None:
    with (shared_data / "mmvp" / "Questions.csv").open() as file:
        assert {pattern_type(row["Category"]) for row in csv.DictReader(file)} == set(PATTERNS)


def test_against_numpy_and_fisher() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        xs, ys = rng.integers(0, 16, (2, 9)) / 15
        encoder, model = dict(zip(PATTERNS, xs, strict=True)), dict(zip(reversed(PATTERNS), ys, strict=True))
        correlation = correlate(encoder, model)
        r = np.corrcoef(xs, ys[::-1])[0, 1]
        assert correlation.r == pytest.approx(r) and correlation.patterns == list(PATTERNS)
        z = 0.5 * math.log((1 + r) / (1 - r))
        ends = [z - 1.959964 / 6**0.5, z + 1.959964 / 6**0.5]
        assert correlation.interval == pytest.approx([(math.exp(2 * end) - 1) / (math.exp(2 * end) + 1) for end in ends])


def test_names_need_not_agree() -> None:
    encoder = {"Camera_Perspective": 0.1, "Text": 0.4, "Color": 0.3, "State": 0.8, "Presence": 1.0}
    model = {"vp": 0.2, "tx": 0.8, "ca": 0.6, "sc": 0.75, "own": 0.0}
    correlation = correlate(encoder, model)
    assert correlation.patterns == ["Camera Perspective", "Text", "Color", "State"]
    assert correlation.r == pytest.approx(np.corrcoef([0.1, 0.4, 0.3, 0.8], [0.2, 0.8, 0.6, 0.75])[0, 1])


@pytest.mark.parametrize(
    ("encoder", "model", "why"),
    [
        ({"Text": 0.1, "Color": 0.2, "State": 0.3}, {"Text": 0.1, "Color": 0.2, "State": 0.4}, "3 patterns in common; 4 are the least"),
        ({"a": 0.1, "b": 0.2}, {"c": 0.1, "d": 0.2}, "0 patterns in common"),
        (dict.fromkeys("abcd", 0.0), dict(zip("abcd", [0.1, 0.2, 0.3, 0.4], strict=True)), "the encoder scored the same on every pattern"),
        (dict.fromkeys("abcd", 0.1 + 0.2), dict.fromkeys("abcd", 1.0), "the encoder and the model scored the same"),
        ({}, {}, "0 patterns"),
    ],
)  # fmt: skip
def test_too_few_or_constant_patterns_are_said(encoder: dict[str, float], model: dict[str, float], why: str) -> None:
    correlation = correlate(encoder, model)
    assert correlation.r is None and correlation.interval is None and why in correlation.undefined


def test_equal_shares_correlate_fully() -> None:
    shares = dict(zip("abcd", [0.1, 0.2, 0.3, 0.5], strict=True))
    assert correlate(shares, shares).r == pytest.approx(1) and correlate(shares, {k: 1 - v for k, v in shares.items()}).r == pytest.approx(
        -1
    )


def test_published_figures_are_in_their_ranges() -> None:
    assert all(len(shares) == len(PATTERNS) for shares in MMVP_VLM.values())
    assert MMVP_CORRELATION["LLaVA-1.5"] == 0.87 and len(MMVP_CORRELATION) == 5
