"""compare_nulls compares null images by the scores of the same records, each run with another null image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vig.scoring.scores import Scores
from vig.words import Mean

# Shapes: N = records that two runs have both scored, T = their answer tokens.

SAME_RUN = ("weights", "config", "tokenizer", "chat_template", "max_length")  # entries of the manifest that must agree


@dataclass(frozen=True)
class NullRow:
    """A row compares the scores of a run with one null image with the scores of the reference."""

    name: str
    mean: Mean
    """Sample VIG over all records of the run."""
    positive: float
    """Share of the run's records that the image helped."""
    common: int
    """Number of records that the reference has too; the correlations are over these records."""
    sample_correlation: float | None
    """Spearman's rank correlation of sample VIG with the reference; None where either is constant."""
    token_correlation: float | None
    """Spearman's rank correlation of token VIG."""


def null_name(scores: Scores) -> str:
    """Return the name of the null image that the scores were made with."""
    return str(scores.manifest["identity"]["null"]["name"])


def reference_of(runs: Sequence[Scores]) -> Scores:
    """Return the run with `blur`, which the paper uses, or the first run where there is none."""
    return next((run for run in runs if null_name(run) == "blur"), runs[0])


def compare_nulls(runs: Sequence[Scores]) -> list[NullRow]:
    """Return one row per run, in order.

    Raises:
        ValueError: for runs of different models, tokenizers, templates or lengths, or without a record in common with the reference.
    """
    reference = reference_of(runs)
    for run in runs:
        identity, expected = run.manifest["identity"], reference.manifest["identity"]
        different = [key for key in SAME_RUN if identity.get(key) != expected.get(key)]
        if different:
            raise ValueError(
                f"the scores with null={null_name(run)!r} and {null_name(reference)!r} differ in {', '.join(different)} too: "
                "null images are compared on scores of one model"
            )
    return [_row(run, reference) for run in runs]


def _row(run: Scores, reference: Scores) -> NullRow:
    both = [(place, reference.places[id]) for place, id in enumerate(run.ids) if id in reference.places]
    pairs = np.array(both, np.int64).reshape(-1, 2)  # [N, 2] indices of the same record in both runs
    pairs = pairs[np.diff(run.bounds)[pairs[:, 0]] == np.diff(reference.bounds)[pairs[:, 1]]]
    if not len(pairs):
        raise ValueError(f"the scores with null={null_name(run)!r} and {null_name(reference)!r} have no record in common")
    sides = [(run, pairs[:, 0]), (reference, pairs[:, 1])]
    samples = [scores.vig[places] for scores, places in sides]  # 2 of [N]
    tokens = [scores.token_vig[scores.tokens_of(places)] for scores, places in sides]  # 2 of [T]
    correlations = rank_correlation(*samples), rank_correlation(*tokens)
    return NullRow(null_name(run), Mean.of(run.vig), float((run.vig > 0).mean()), len(pairs), *correlations)


def rank_correlation(x: NDArray[np.floating], y: NDArray[np.floating]) -> float | None:
    """Return Spearman's rank correlation. The result is None where all of x or all of y is equal."""
    from scipy.stats import spearmanr  # slow to import

    return None if np.ptp(x) == 0 or np.ptp(y) == 0 else float(spearmanr(x, y).statistic)
