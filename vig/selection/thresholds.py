"""The samples and answer tokens that training spends its loss on, chosen by a threshold of their VIG (arXiv 2602.17186)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mof.data.records import RecordError, to_record
from mof.data.rows import RawRecord, id_of, rows
from vig.scoring.scores import Score, Scores
from vig.selection.sources import NO_SOURCE
from vig.selection.summary import Counts, Summary

# Shapes: N = scored records, T = answer tokens of one record.

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen samples and, in each, the answer tokens that are supervised."""

    threshold: float | None
    """The VIG from which samples are kept; None for a random selection. A source with a quota may have a lower threshold."""
    token_masks: dict[str, NDArray[np.bool_]]
    """id -> [T], for every chosen sample in the order of the scores. Where it is False, the token stays in context without loss."""
    scores: Scores
    sources: Mapping[str, str] = field(default_factory=dict)
    """id -> source, for the summary."""
    token_weights: dict[str, NDArray[np.float32]] | None = None
    """id -> [T], 0 where the mask is False; None for a hard mask (see `weighted`)."""

    def __repr__(self) -> str:
        lines = [f"Selection from {len(self.scores):,} scored records", *str(self.summary()).splitlines()]
        return "\n".join(lines if len(lines) <= 10 else [*lines[:9], f"  and {len(lines) - 9} more sources; summary() shows all"])

    @property
    def sample_ids(self) -> list[str]:
        return list(self.token_masks)

    def summary(self) -> Summary:
        """Count everything, and each source in the order of the alphabet."""
        groups: dict[str, list[Score]] = {}
        for score in self.scores:
            groups.setdefault(self.sources.get(score.id, NO_SOURCE), []).append(score)
        return Summary(
            **vars(self._counts(self.scores)),
            threshold=self.threshold,
            failed=len(self.scores.failures),
            text_only=len(self.scores.manifest["text_only"]),
            sources={source: self._counts(groups[source]) for source in sorted(groups)} if self.sources else {},
        )

    def weighted(self, low: float, high: float) -> Selection:
        """Return this selection with token weights in place of a hard mask: each token counts by its VIG.

        The weight of a supervised token is its VIG, clamped to `low` and `high`, divided by the mean of all clamped VIGs. So a
        weight is 1 on average. End-of-turn tokens weigh 1: the model learns when to stop as in plain training.

        Raises:
            ValueError: unless 0 < low <= high < infinity.
        """
        if not 0 < low <= high < math.inf:
            raise ValueError(f"token weights are clamped to 0 < low <= high; got {low} and {high}")
        masks = {score.id: _without(self.token_masks[score.id], score.turn_ends) for score in self._chosen()}  # [T] each
        clamped = {score.id: score.token_vig.clip(low, high) for score in self._chosen()}  # [T] each
        chosen = [clamped[id][masks[id]] for id in masks]
        mean = np.concatenate(chosen).mean(dtype=np.float64) if any(map(len, chosen)) else 1.0
        weights = {}
        for id, mask in self.token_masks.items():
            weights[id] = np.where(masks[id], clamped[id] / mean, mask).astype(np.float32)  # [T]
        return dataclasses.replace(self, token_weights=weights)

    def apply(self, records: Iterable[RawRecord]) -> list[dict[str, Any]]:
        """Return the records to train on, in order.

        Chosen records get a "token_mask" (or "token_weights"), and text-only records stay as they are. All others are left out:
        records that were not chosen or could not be scored, and (with a warning) records that were never scored though they have
        an image, or that cannot be read.
        """
        scored, text_only, chosen, unknown = set(self.scores.ids), set(self.scores.manifest["text_only"]), [], 0
        for record in rows(records):
            id = id_of(record)
            if id in self.token_masks and self.token_weights is not None:
                chosen.append({**_as_dict(record, id), "token_weights": self.token_weights[id].tolist()})
            elif id in self.token_masks:
                chosen.append({**_as_dict(record, id), "token_mask": self.token_masks[id].tolist()})
            elif id in scored or id in self.scores.failures:
                continue
            elif id in text_only or _is_text_only(record):
                chosen.append(_as_dict(record, id))
            else:
                unknown += 1
        if unknown:
            logger.warning(
                "%d records have no score though they have an image, or cannot be read; they are left out of the training set", unknown
            )
        return chosen

    def _chosen(self) -> Iterator[Score]:
        return (score for score in self.scores if score.id in self.token_masks)

    def _counts(self, scores: Iterable[Score]) -> Counts:
        scores = list(scores)
        masks = [self.token_masks[score.id] for score in scores if score.id in self.token_masks]
        tokens = sum(len(score.token_vig) for score in scores)
        return Counts(len(masks), len(scores), sum(int(mask.sum()) for mask in masks), tokens)


def select(
    scores: Scores,
    keep: float = 0.7,
    *,
    threshold: float | None = None,
    token_keep: float | None = None,
    token_threshold: Literal["shared"] | float | None = "shared",
    keep_end_of_turn: bool = True,
    sources: Mapping[str, str] | None = None,
    quota: float | Mapping[str, float] = 0.0,
) -> Selection:
    """Keep the samples that the image helped most and, inside them, the tokens that it helped.

    A sample is kept when its VIG reaches the threshold tau. Tau is the lowest VIG in the top `keep` share of the samples (rounded
    up), so samples with a VIG equal to tau are kept too. The token sparsity follows from tau: see `Selection.summary`.

    With a quota, each source first keeps its own top share; the rest of `keep` goes to the best of all other samples. A source
    that is kept by its quota has a lower threshold than the other sources. With `token_threshold="shared"`, this also holds for
    its tokens.

    Args:
        keep: share of the scored samples, in [0, 1]. 1 keeps every sample, and together with `token_threshold=None` every
            token: this is plain training.
        threshold: tau itself, in nats, in place of `keep`.
        token_keep: share of the answer tokens of the kept samples, in [0, 1], in place of `token_threshold`. End-of-turn tokens
            may be kept in addition.
        token_threshold: the VIG from which a token is supervised. "shared" is tau (as in the paper), None supervises all tokens.
        keep_end_of_turn: supervise the end-of-turn tokens of kept samples whatever their VIG is. The image hardly ever helps to
            predict them, and without them a model forgets how to stop.
        sources: id -> source of each record (`vig.record_sources`). A record that is missing here has the source "(none)".
        quota: the smallest share to keep of every source, or a dict from sources to their smallest shares, in [0, 1].

    Raises:
        ValueError: for no scores, scores that are not finite, a share or threshold out of range, or a quota for a source
            that no scored record has.
    """
    check_scores(scores)
    _check_share("keep", keep)
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold is None or a finite number of nats; got {threshold}")
    if token_threshold != "shared" and token_threshold is not None and not math.isfinite(token_threshold):
        raise ValueError(f"token_threshold is 'shared', None or a finite number; got {token_threshold}")
    named = {score.id: (sources or {}).get(score.id, NO_SOURCE) for score in scores}
    taus = _thresholds(scores, keep, threshold, named, _quotas(quota, named))
    kept = [score for score in scores if score.vig >= taus[named[score.id]]]
    if token_keep is not None:
        _check_share("token_keep", token_keep)
        token_threshold = _threshold(np.concatenate([score.token_vig for score in kept] or [np.empty(0, np.float32)]), token_keep)
    masks = {}
    for score in kept:
        floor = taus[named[score.id]] if token_threshold == "shared" else -math.inf if token_threshold is None else token_threshold
        masks[score.id] = _mask(score, float(floor), keep_end_of_turn)
    return Selection(max(taus.values()), masks, scores, sources or {})


def check_scores(scores: Scores) -> None:
    """ValueError for no scores, or scores that are not finite."""
    if not len(scores):
        raise ValueError("there are no scores to select from; were all records text-only or unreadable?")
    bad = [score.id for score in scores if not (np.isfinite(score.vig) and np.isfinite(score.token_vig).all())]
    if bad:
        raise ValueError(f"{len(bad)} scores are not finite, the first of record {bad[0]!r}; score them again")


def _quotas(quota: float | Mapping[str, float], sources: Mapping[str, str]) -> dict[str, float]:
    """The smallest share of each source, for all sources."""
    known = set(sources.values())
    quotas = dict(quota) if isinstance(quota, Mapping) else dict.fromkeys(known, quota)
    for source, share in quotas.items():
        _check_share(f"the quota of {source!r}", share)
        if source not in known:
            raise ValueError(f"no scored record has the source {source!r}; there are {', '.join(sorted(known))}")
    return dict.fromkeys(known, 0.0) | quotas


def _thresholds(
    scores: Scores, keep: float, threshold: float | None, sources: Mapping[str, str], quotas: Mapping[str, float]
) -> dict[str, float]:
    """The VIG from which samples are kept, for each source."""
    vig, of_source = scores.vig, np.array([sources[id] for id in scores.ids])  # [N], [N]
    own = {source: _threshold(vig[of_source == source], share) for source, share in quotas.items()}
    by_quota = vig >= np.array([own[source] for source in of_source])  # [N]
    if threshold is None:
        left = max(_count(keep, len(vig)) - int(by_quota.sum()), 0)
        threshold = float(np.sort(vig[~by_quota])[-left]) if left else math.inf
    threshold = float(np.float32(threshold))  # as the scores are, so that 0.1 keeps a VIG of 0.1
    return {source: min(threshold, lowest) for source, lowest in own.items()}


def _threshold(values: NDArray[np.float32], share: float) -> float:
    """The lowest value in the top `share` of values; infinity when this share is empty."""
    count = _count(share, len(values))
    return float(np.sort(values)[-count]) if count else math.inf


def _count(share: float, total: int) -> int:
    return math.ceil(round(share * total, 6))  # 0.07 * 100 is a little more than 7 in floating point


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:  # refuses NaN too
        raise ValueError(f"{name} is a share, in [0, 1]; got {share}")


def _mask(score: Score, floor: float, keep_end_of_turn: bool) -> NDArray[np.bool_]:
    mask = score.token_vig >= floor  # [T]
    if keep_end_of_turn:
        mask[score.turn_ends] = True
    return mask


def _without(mask: NDArray[np.bool_], turn_ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = mask.copy()
    mask[turn_ends] = False
    return mask


def _as_dict(record: Any, id: str) -> dict[str, Any]:
    """The record as a dict: a list of messages has no place for a mask."""
    return dict(record) if isinstance(record, Mapping) else {"id": id, "messages": record}


def _is_text_only(record: Any) -> bool:
    """Whether training can take the record without a score: it is readable and has an answer and no image."""
    try:
        read = to_record(record)
    except RecordError:
        return False
    return not read.images and any(message["role"] == "assistant" for message in read.messages)
