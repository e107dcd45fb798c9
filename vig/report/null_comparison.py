"""What the choice of the null image changes: scores of the same records made with several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vig.means import Mean
from vig.scoring.scores import Scores

# Shapes: N = records that two runs have both scored, T = their answer tokens.

SAME_RUN = ("weights", "config", "tokenizer", "chat_template", "max_length")  # entries of the manifest that must agree


@dataclass(frozen=True)
class NullRow:
    """One null image beside the reference."""

    name: str
    mean: Mean
    """Sample VIG of its own records."""
    positive: float
    """Share of its records that the image helped."""
    common: int
    """Records that the reference has too; the correlations are over these."""
    sample_correlation: float | None
    """Spearman's rank correlation of sample VIG with the reference; None where one of them is the same for all."""
    token_correlation: float | None
    """The same of token VIG."""


def null_name(scores: Scores) -> str:
    """The null image that the scores were made with."""
    return str(scores.manifest["identity"]["null"]["name"])


def reference_of(runs: Sequence[Scores]) -> Scores:
    """The run with `blur`, as in the paper; the first where there is none."""
    return next((run for run in runs if null_name(run) == "blur"), runs[0])


def compare_nulls(runs: Sequence[Scores]) -> list[NullRow]:
    """One row per run, in order.

    Raises:
        ValueError: for runs of another model, tokenizer, template or length, or without a record in common with the reference.
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
    others = {score.id: score for score in reference}
    both = [(score, others[score.id]) for score in run if score.id in others and len(score.token_vig) == len(others[score.id].token_vig)]
    if not both:
        raise ValueError(f"the scores with null={null_name(run)!r} and {null_name(reference)!r} have no record in common")
    samples = np.array([[one.vig, other.vig] for one, other in both])  # [N, 2]
    tokens = [np.concatenate([pair[k].token_vig for pair in both]) for k in (0, 1)]  # 2 of [T]
    correlations = rank_correlation(samples[:, 0], samples[:, 1]), rank_correlation(*tokens)
    return NullRow(null_name(run), Mean.of(run.vig), float((run.vig > 0).mean()), len(both), *correlations)


def rank_correlation(x: NDArray[np.floating], y: NDArray[np.floating]) -> float | None:
    """Spearman's: the correlation of the ranks, ties sharing their mean rank. None where all of x or all of y is equal."""
    ranks = np.stack([_ranks(x), _ranks(y)])  # [2, N]
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1)  # [2]
    return float(ranks[0] @ ranks[1] / norms.prod()) if norms.all() else None


def _ranks(x: NDArray[np.floating]) -> NDArray[np.float64]:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)  # [distinct], [N], [distinct]
    return (counts.cumsum() - (counts - 1) / 2)[place]  # [N]
