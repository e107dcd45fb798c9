"""The samples and answer tokens that training spends its loss on, chosen by a threshold of their VIG (arXiv 2602.17186)."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mof.data.records import SCORED, RecordError, digest, to_record, unselected
from mof.data.rows import RawRecord, id_of, rows
from vig.scoring.scores import Scores
from vig.selection.sources import NO_SOURCE
from vig.selection.summary import Counts, Summary

# Shapes: N = scored records, T = answer tokens of one record, A = answer tokens of all scored records.

AS_SCORED = "give the records as they were scored, or score these"
logger = logging.getLogger(__name__)


class PerToken(Mapping[str, NDArray[Any]]):
    """id -> [T], a value for each answer token of the chosen samples, in the order of the scores.

    Args:
        chosen: [N] which scores are chosen.
        flat: [A] a value for each answer token of all scores, chosen or not.
    """

    def __init__(self, scores: Scores, chosen: NDArray[np.bool_], flat: NDArray[Any]) -> None:
        self.scores, self.chosen, self.flat = scores, chosen, flat

    def __getitem__(self, id: str) -> NDArray[Any]:
        place = self.scores.places[id]
        if not self.chosen[place]:
            raise KeyError(id)
        return self.flat[self.scores.bounds[place] : self.scores.bounds[place + 1]]

    def __iter__(self) -> Iterator[str]:
        return itertools.compress(self.scores.ids, self.chosen.tolist())

    def __len__(self) -> int:
        return int(self.chosen.sum())


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen samples and, in each, the answer tokens that are supervised."""

    threshold: float | None
    """The VIG from which samples are kept; None for a random selection. A source with a quota may have a lower threshold."""
    token_masks: PerToken
    """id -> [T], for every chosen sample in the order of the scores. Where it is False, the token stays in context without loss."""
    scores: Scores
    sources: Mapping[str, str] = field(default_factory=dict)
    """id -> source, for the summary."""
    token_weights: PerToken | None = None
    """id -> [T], 0 where the mask is False; None for a hard mask (see `weighted`)."""

    @property
    def sample_ids(self) -> list[str]:
        return list(self.token_masks)

    def summary(self) -> Summary:
        """Count everything, and each source in the order of the alphabet."""
        names, codes = source_codes(self.scores, self.sources)
        lengths = np.diff(self.scores.bounds)  # [N]
        tokens = np.add.reduceat(np.append(self.token_masks.flat, False), self.scores.bounds[:-1], dtype=np.int64) * (lengths > 0)  # [N]
        columns = (self.token_masks.chosen, np.ones(len(codes)), tokens, lengths)  # of [N], in the order of `Counts`
        by_source = [np.bincount(codes, column, len(names)).astype(int).tolist() for column in columns]
        samples_kept, samples_total, tokens_kept, tokens_total = map(sum, by_source)
        return Summary(
            samples_kept,
            samples_total,
            tokens_kept,
            tokens_total,
            threshold=self.threshold,
            failed=len(self.scores.failures),
            text_only=len(self.scores.manifest["text_only"]),
            sources={name: Counts(*row) for name, *row in zip(names, *by_source, strict=True)} if self.sources else {},
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
        inner = self.token_masks.flat.copy()  # [A]
        inner[self.scores.turn_ends] = False
        clamped = self.scores.token_vig.clip(low, high)  # [A]
        mean = clamped[inner].mean(dtype=np.float64) if inner.any() else 1.0
        weights = np.where(inner, clamped / mean, self.token_masks.flat).astype(np.float32)  # [A]
        return dataclasses.replace(self, token_weights=PerToken(self.scores, self.token_masks.chosen, weights))

    def apply(self, records: Iterable[RawRecord]) -> list[dict[str, Any]]:
        """Return the records to train on, in order.

        Chosen records get a "token_mask" (or "token_weights") and, under "scored_digest", the digest of the record that it belongs to.
        Text-only records stay as they are. All others are left out: records that were not chosen or could not be scored, and (with a
        warning) records that were never scored though they have an image, or that cannot be read.

        Raises:
            ValueError: for a record that has changed since it was scored, or if the scoring run met none of the records.
        """
        return list(self.applied(records))

    def applied(self, records: Iterable[RawRecord]) -> Iterator[dict[str, Any]]:
        """Yield the records that `apply` returns, without holding them in memory."""
        text_only, values = set(self.scores.manifest["text_only"]), self.token_masks if self.token_weights is None else self.token_weights
        key, known, unknown = "token_mask" if self.token_weights is None else "token_weights", 0, 0
        for record in rows(records):
            id = id_of(record)
            place = self.scores.places.get(id)
            known += place is not None or id in text_only or id in self.scores.failures
            if place is not None:
                self._require_scored(record, id, place)
                if values.chosen[place]:
                    own = unselected(_as_dict(record, id))
                    same = self.scores.digests[place] if own == record else digest(own)  # a digest takes its time
                    yield {**own, key: values[id].tolist(), SCORED: same}
            elif id in text_only or (id not in self.scores.failures and _is_text_only(record)):
                yield _as_dict(record, id)
            else:
                unknown += id not in self.scores.failures
        if not known:
            raise ValueError(f"the scoring run met none of these records; {AS_SCORED}")
        if unknown:
            logger.warning(
                "%d records have no score though they have an image, or cannot be read; they are left out of the training set", unknown
            )

    def _require_scored(self, record: Any, id: str, place: int) -> None:
        if digest(record) != self.scores.digests[place]:
            raise ValueError(f"record {id!r} is not what was scored; {AS_SCORED}")


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
    names, codes = source_codes(scores, sources or {})
    taus = np.array(_thresholds(scores.vig, keep, threshold, codes, _quotas(quota, names)), np.float32)  # of each source
    lengths = np.diff(scores.bounds)  # [N]
    chosen = scores.vig >= taus[codes]  # [N]
    in_chosen = np.repeat(chosen, lengths)  # [A]
    if token_keep is not None:
        _check_share("token_keep", token_keep)
        token_threshold = _threshold(scores.token_vig[in_chosen], token_keep)
    floors = taus[codes] if token_threshold == "shared" else -math.inf if token_threshold is None else token_threshold
    mask = scores.token_vig >= np.repeat(np.broadcast_to(np.float32(floors), len(scores)), lengths)  # [A]
    if keep_end_of_turn:
        mask[scores.turn_ends] = True
    return Selection(float(taus.max()), PerToken(scores, chosen, mask & in_chosen), scores, sources or {})


def source_codes(scores: Scores, sources: Mapping[str, str]) -> tuple[list[str], NDArray[np.int64]]:
    """The sources of the scored records in the order of the alphabet, and [N] the index of each record's source among them."""
    if not sources:
        return [NO_SOURCE], np.zeros(len(scores), np.int64)
    named = [sources.get(id, NO_SOURCE) for id in scores.ids]
    names = sorted(set(named))
    places = {name: place for place, name in enumerate(names)}
    return names, np.array([places[name] for name in named], np.int64)


def check_scores(scores: Scores) -> None:
    """ValueError for no scores, or scores that are not finite."""
    if not len(scores):
        raise ValueError("there are no scores to select from; were all records text-only or unreadable?")
    finite = np.isfinite(scores.vig)  # [N]
    if finite.all() and np.isfinite(scores.token_vig).all():
        return
    finite[np.repeat(np.arange(len(scores)), np.diff(scores.bounds))[~np.isfinite(scores.token_vig)]] = False
    first = scores.ids[int(finite.argmin())]
    raise ValueError(f"{int((~finite).sum())} scores are not finite, the first of record {first!r}; score them again")


def _quotas(quota: float | Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The smallest share of each source, for all sources."""
    quotas = dict(quota) if isinstance(quota, Mapping) else dict.fromkeys(names, quota)
    for source, share in quotas.items():
        _check_share(f"the quota of {source!r}", share)
        if source not in names:
            raise ValueError(f"no scored record has the source {source!r}; there are {', '.join(names)}")
    return [quotas.get(name, 0.0) for name in names]


def _thresholds(
    vig: NDArray[np.float32], keep: float, threshold: float | None, codes: NDArray[np.int64], quotas: Sequence[float]
) -> list[float]:
    """The VIG from which samples are kept, for each source."""
    own = [_threshold(vig[codes == code], share) for code, share in enumerate(quotas)]
    by_quota = vig >= np.array(own)[codes]  # [N]
    if threshold is None:
        left = max(_count(keep, len(vig)) - int(by_quota.sum()), 0)
        threshold = float(np.sort(vig[~by_quota])[-left]) if left else math.inf
    return [min(threshold, lowest) for lowest in own]


def _threshold(values: NDArray[np.float32], share: float) -> float:
    """The lowest value in the top `share` of values; infinity when this share is empty."""
    count = _count(share, len(values))
    return float(np.sort(values)[-count]) if count else math.inf


def _count(share: float, total: int) -> int:
    return math.ceil(round(share * total, 6))  # 0.07 * 100 is a little more than 7 in floating point


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:  # refuses NaN too
        raise ValueError(f"{name} is a share, in [0, 1]; got {share}")


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
