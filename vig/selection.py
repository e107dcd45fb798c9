"""Which samples and which answer tokens training spends its loss on (arXiv 2602.17186, selection by one threshold)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vig.pairs import RawRecord, record_id
from vig.scores import Score, Scores

# Shapes: N = scored records, T = answer tokens of one record, A = answer tokens of several records together.

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a selection keeps. Text-only records are kept whole and not counted here."""

    samples_kept: int
    samples_total: int
    tokens_kept: int
    tokens_total: int
    threshold: float | None
    """In nats; None for a random selection."""
    failed: int
    """Records that could not be scored; training leaves them out."""

    @property
    def sparsity(self) -> float:
        """Share of the scored answer tokens that get no loss."""
        return 1 - self.tokens_kept / self.tokens_total

    def __str__(self) -> str:
        rule = "at random" if self.threshold is None else f"with VIG >= {self.threshold:.4f}"
        return (
            f"{self.samples_kept} of {self.samples_total} samples and {self.tokens_kept} of {self.tokens_total} answer "
            f"tokens {rule}, sparsity {self.sparsity:.1%}" + (f"; {self.failed} failed left out" if self.failed else "")
        )


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen samples and, in each, the answer tokens that are supervised."""

    threshold: float | None
    token_masks: dict[str, NDArray[np.bool_]]
    """id -> [T], for every chosen sample in the order of the scores; False: the token stays in context without loss."""
    scores: Scores

    @property
    def sample_ids(self) -> list[str]:
        return list(self.token_masks)

    def summary(self) -> Summary:
        return Summary(
            samples_kept=len(self.token_masks),
            samples_total=len(self.scores),
            tokens_kept=sum(int(mask.sum()) for mask in self.token_masks.values()),
            tokens_total=sum(len(score.token_vig) for score in self.scores),
            threshold=self.threshold,
            failed=len(self.scores.failures),
        )

    def apply(self, records: Iterable[RawRecord]) -> list[dict[str, Any]]:
        """The records to train on, in order.

        Chosen ones get a "token_mask", text-only ones stay as they are, and the others are left out: those not chosen,
        those that could not be scored, and (with a warning) those with an image that were never scored.
        """
        scored, chosen, unknown = set(self.scores.ids), [], 0
        for record in records:
            id = record_id(record)
            if id in self.token_masks:
                chosen.append({**record, "token_mask": self.token_masks[id].tolist()})
            elif id in scored or id in self.scores.failures:
                continue
            elif _has_image(record):
                unknown += 1
            else:
                chosen.append(dict(record))
        if unknown:
            logger.warning("%d records have an image and no score; they are left out of the training set", unknown)
        return chosen


def select(
    scores: Scores,
    keep: float = 0.7,
    *,
    token_threshold: Literal["shared"] | float | None = "shared",
    keep_end_of_turn: bool = True,
) -> Selection:
    """Keep the samples that the image helped most and, inside them, the tokens that it helped.

    A sample is kept when its VIG reaches the threshold tau, the VIG of the last of the top `keep` share (rounded up);
    samples level with tau are kept too. The achieved token sparsity is a side effect: see `Selection.summary`.

    Args:
        keep: share of the scored samples, in [0, 1]. 1 keeps every sample, and with `token_threshold=None` every token:
            training is then plain training.
        token_threshold: VIG from which a token is supervised: "shared" is tau itself (the paper), None supervises all.
        keep_end_of_turn: supervise the end-of-turn tokens of kept samples whatever their VIG. The image hardly ever
            helps to predict them, and without them a model unlearns to stop.

    Raises:
        ValueError: for no scores, scores that are not finite, or `keep` or `token_threshold` out of range.
    """
    _check(scores)
    if not 0 <= keep <= 1:  # refuses NaN too
        raise ValueError(f"keep is the share of samples to keep, in [0, 1]; got {keep}")
    if token_threshold != "shared" and token_threshold is not None and not math.isfinite(token_threshold):
        raise ValueError(f"token_threshold is 'shared', None or a finite number; got {token_threshold}")
    threshold = _threshold(scores.vig, keep)
    floor = threshold if token_threshold == "shared" else -math.inf if token_threshold is None else float(token_threshold)
    masks = {score.id: _mask(score, floor, keep_end_of_turn) for score in scores if score.vig >= threshold}
    return Selection(threshold, masks, scores)


def random_selection(scores: Scores, like: Selection, seed: int = 0) -> Selection:
    """The control for `like`: as many samples and as many supervised tokens, both drawn at random.

    End-of-turn tokens come first, as far as the number of tokens allows, so that the control differs in which words it
    supervises and not in whether it learns to stop. Where random samples have fewer tokens than are needed, the
    shortest are exchanged for the longest of the others.

    Raises:
        ValueError: for no scores, or scores that `like` was not made from.
    """
    _check(scores)
    if like.scores.ids != scores.ids:
        raise ValueError("like was made from other scores; give the same scores to select and random_selection")
    rng = np.random.default_rng(seed)
    lengths = np.array([len(score.token_vig) for score in scores])  # [N]
    budget = like.summary().tokens_kept
    order = rng.permutation(len(scores))  # [N]
    chosen, others = (sorted(part, key=lambda i: lengths[i]) for part in np.split(order, [len(like.token_masks)]))
    for place, other in zip(range(len(chosen)), reversed(others), strict=False):
        if lengths[chosen].sum() >= budget:
            break
        chosen[place] = other
    picked = [scores[i] for i in sorted(chosen)]
    priority = [_priority(score, rng) for score in picked]  # one [T] per sample
    flat = np.concatenate(priority or [np.empty(0)])  # [A]
    mask = np.zeros(len(flat), dtype=bool)  # [A]
    mask[np.argsort(flat)[:budget]] = True
    parts = np.split(mask, np.cumsum([len(p) for p in priority])[:-1])
    return Selection(None, {score.id: part for score, part in zip(picked, parts, strict=False)}, scores)


def _threshold(vig: NDArray[np.float32], keep: float) -> float:
    """VIG of the last sample of the top `keep` share; infinite when that share is empty."""
    count = math.ceil(round(keep * len(vig), 6))  # 0.07 * 100 is a little more than 7 in floating point
    return float(np.sort(vig)[-count]) if count else math.inf


def _mask(score: Score, floor: float, keep_end_of_turn: bool) -> NDArray[np.bool_]:
    mask = score.token_vig >= floor  # [T]
    if keep_end_of_turn:
        mask[score.turn_ends] = True
    return mask


def _priority(score: Score, rng: np.random.Generator) -> NDArray[np.float64]:
    """A random number per token, [T]; the lowest are supervised, end-of-turn tokens before all others."""
    priority = rng.random(len(score.token_vig))  # [T]
    priority[score.turn_ends] -= 1
    return priority


def _has_image(record: RawRecord) -> bool:
    contents = [turn.get("content") for turn in record.get("messages", [])]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return bool(record.get("image") or record.get("images")) or any(part.get("type") == "image" for part in parts)


def _check(scores: Scores) -> None:
    if not len(scores):
        raise ValueError("there are no scores to select from; were all records text-only or unreadable?")
    bad = [score.id for score in scores if not (np.isfinite(score.vig) and np.isfinite(score.token_vig).all())]
    if bad:
        raise ValueError(f"{len(bad)} scores are not finite, the first of record {bad[0]!r}; score them again")
