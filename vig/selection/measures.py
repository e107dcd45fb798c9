"""These measures say how much an image helps an answer. Most are published, one is ours. All come from the two passes of a score file.

Each is a function from scores to a value of every answer token, [A], or of every record, [N]. `vig.select(..., by=NAME)` takes the
records (and tokens) with the highest values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vig.scoring.scores import Scores
from vig.words import word_class, word_places

# Shapes: N = scored records, A = answer tokens of all scored records, T = answer tokens of one record.

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Measure:
    """A measure gives the values by which records and tokens are chosen."""

    tokens: Callable[[Scores], Values] | None
    """This function returns [A]; None for a measure of whole records."""
    records: Callable[[Scores], Values] | None = None
    """This function returns [N]; None takes the mean over the tokens of each record."""
    neutral: float | None = None
    """The value of a record whose image changes nothing, for a measure that tells help from harm."""
    nulls: tuple[str, ...] = ()
    """The null images that the paper allows; empty for all."""

    def of(self, scores: Scores) -> tuple[Values | None, Values]:
        """Return the values of all answer tokens, [A] or None, and of all records, [N].

        Raises:
            ValueError: for values that are not finite, or scores without the columns that the measure needs.
        """
        tokens = None if self.tokens is None else self.tokens(scores)  # [A]
        records = self.records(scores) if self.records is not None else record_means(scores, tokens)  # [N]
        finite = np.isfinite(records)
        if not finite.all():
            raise ValueError(f"{int((~finite).sum())} values are not finite, the first of record {scores.ids[int(finite.argmin())]!r}")
        return tokens, records


def record_means(scores: Scores, tokens: Values | None) -> Values:
    """Return [N], the mean of token values [A] over each record; float32, so that no mean exceeds the highest token of its record."""
    assert tokens is not None, "a measure has values of tokens or of records"
    lengths = np.diff(scores.bounds)  # [N]
    sums = np.add.reduceat(np.append(tokens, 0), scores.bounds[:-1], dtype=np.float64) * (lengths > 0)  # [N]
    return (sums / lengths.clip(1)).astype(np.float32)


def vig(scores: Scores) -> Values:
    """Return [A], the loss with the null image minus the loss with the image (arXiv 2602.17186)."""
    return scores.token_vig


def cal(scores: Scores) -> Values:
    """Return [A], CAL's weight of each token (arXiv 2405.17871), before it is divided by the sum (`Selection.weighted` does so).

    The weight is the answer token's logit with the image minus its logit without it, clamped to 1..5, and averaged over three
    neighbours as by torch's AvgPool1d(3, stride=1, padding=1): beyond the ends of a record's answer stand zeros. The paper's null
    is "attention".
    """
    clamped = (scores.column("token_logit") - scores.column("null_token_logit")).clip(1, 5)  # [A]
    index = np.arange(len(clamped))
    inner = np.ones(len(clamped) + 1, bool)
    inner[scores.bounds] = False  # the first token of each record has none before it
    before = np.where(inner[:-1], clamped[index - 1], 0)  # [A]
    after = np.where(inner[1:], clamped[(index + 1) % max(len(clamped), 1)], 0)  # [A]
    return ((before + clamped + after) / 3).astype(np.float32)


def entropy(scores: Scores) -> Values:
    """Return [A], the entropy over the vocabulary with the null image minus the entropy with the image (arXiv 2608.21883)."""
    return scores.column("null_token_entropy") - scores.column("token_entropy")


def vppo(scores: Scores) -> Values:
    """Return [A], the divergence k3 = exp(d) - d - 1 with d = log p_null - log p, clamped to -20..20 (arXiv 2510.09285, 2507.06448).

    It is 0 where the image changes nothing, and above 0 where the image helps or harms. The paper keeps the top 40 % of the tokens:
    select(scores, 1, token_keep=0.4, by="vppo").
    """
    d = -scores.token_vig.astype(np.float64).clip(-20, 20)  # [A]
    return (np.expm1(d) - d).astype(np.float32)


def vic(scores: Scores) -> Values:
    """Return [N], the exponential of the records' mean VIG over words that say what an image shows (VIC, of DICS).

    A token of a function word ("the", "of"), of no word, or at the end of a turn has weight 0, all others have weight 1. These
    weights are ours: the paper's are not public. A record whose weights are all 0 has the value 1, like an image that changes nothing.
    """
    values = np.ones(len(scores), np.float32)  # [N]
    for place, score in enumerate(scores):
        weights = np.zeros(len(score.token_vig), bool)  # [T]
        for word, places in word_places(score):
            weights[places] |= word_class(word) != "function"
        if weights.any():
            values[place] = np.exp(score.token_vig[weights].mean(dtype=np.float64))
    return values


def gain(scores: Scores) -> Values:
    """Return [A], the probability of each answer token with the image minus its probability with the null image; ours.

    It lies in -1..1, and near 0 for words that the model cannot predict with or without the image. The VIG of these words can be large
    by accident, because their losses are large.
    """
    return np.exp(-scores.column("token_loss")) - np.exp(-scores.column("null_token_loss"))


MEASURES = {
    "vig": Measure(vig, lambda scores: scores.vig, neutral=0.0),
    "cal": Measure(cal),
    "visnec": Measure(None, lambda scores: scores.vig, neutral=0.0, nulls=("drop",)),  # arXiv 2603.01195: VIG without the image
    "vic": Measure(None, vic, neutral=1.0),
    "entropy": Measure(entropy, neutral=0.0),
    "vppo": Measure(vppo),
    "gain": Measure(gain, neutral=0.0),
}


def measure_named(name: str, scores: Scores) -> Measure:
    """Return the measure of this name. ValueError for an unknown name, or scores with a null image that the measure does not allow."""
    if name not in MEASURES:
        raise ValueError(f"unknown measure {name!r}; expected one of {', '.join(MEASURES)}")
    measure, null = MEASURES[name], scores.manifest["identity"].get("null", {}).get("name")
    if measure.nulls and null not in measure.nulls:
        raise ValueError(
            f"{name} compares with null {' or '.join(map(repr, measure.nulls))}, these scores are of null {null!r}; score again"
        )
    return measure


def excess_loss(scores: Scores, reference: Scores) -> Values:
    """Return [A], the loss minus the loss of a reference model, both with the image (RHO-1, arXiv 2404.07965).

    The paper trains on the top 60 % of all tokens: select(scores, 1, token_keep=0.6, reference=reference).

    Raises:
        ValueError: for a record that the reference lacks, or has with other answer tokens; or scores without the measure "loss".
    """
    loss, other = scores.column("token_loss"), reference.column("token_loss")
    lacking = [id for id in scores.ids if id not in reference.places]
    if lacking:
        raise ValueError(f"the reference has no score of {len(lacking)} records, the first is {lacking[0]!r}; score the same records")
    places = np.array([reference.places[id] for id in scores.ids], np.int64)  # [N]
    same = np.diff(scores.bounds) == np.diff(reference.bounds)[places]  # [N]
    tokens = reference.tokens_of(places)  # [A], if all are the same
    if same.all():
        apart = scores.column("token_ids") != reference.column("token_ids")[tokens]  # [A]
        same[np.repeat(np.arange(len(same)), np.diff(scores.bounds))[apart]] = False
    if not same.all():
        first = scores.ids[int(same.argmin())]
        raise ValueError(f"record {first!r} has other answer tokens in the reference; both need one tokenizer and template")
    return loss - other[tokens]
