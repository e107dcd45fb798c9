"""A selection holds the chosen samples and answer tokens. It gives their counts, their weights, and the records to train on."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mof.data.digests import SCORED, digest, unselected
from mof.data.record_files import UnreadableRow
from mof.data.records import RecordError, to_record
from mof.data.rows import RawRecord, opened, rows_by_id
from vig.scoring.scores import Scores
from vig.selection.data_sets import is_data_set, with_entries, with_numbered_ids
from vig.selection.measures import MEASURES
from vig.selection.sources import NO_SOURCE
from vig.selection.summary import Counts, Summary

# Shapes: N = scored records, T = answer tokens of one record, A = answer tokens of all scored records.

CONTENT = ("id", "image", "images", "conversations", "messages")  # the entries of a record that its scores depend on
MOST_CHOICES = 256  # sets of entries that are tried: each may have been added to a record after it was scored
FEWEST = 50  # records; fewer would be warned of by chance
UNLIKELY = 3.0  # nats; words with this mean loss have a probability of a twentieth, which a model can hardly predict
BLOCK = 1 << 16  # records whose tokens are counted at a time
AS_SCORED = "give the records as they were scored (in their order, as equal ids are numbered), or score these"
logger = logging.getLogger(__name__)


class PerToken(Mapping[str, NDArray[Any]]):
    """PerToken maps an id to [T], a value for each answer token of the chosen samples, in the order of the scores.

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
    """A selection holds the chosen samples and, in each, the answer tokens that are supervised."""

    threshold: float | None
    """The VIG from which samples are kept; None for a random selection. A source with a quota may have a lower threshold."""
    token_masks: PerToken
    """id -> [T], for every chosen sample in the order of the scores. Where it is False, the token stays in context without loss."""
    scores: Scores
    sources: Mapping[str, str] = field(default_factory=dict)
    """id -> source, for the summary."""
    token_weights: PerToken | None = None
    """id -> [T], 0 where the mask is False; None for a hard mask (see `weighted`)."""
    by: str = "vig"
    """The measure by which it was selected."""
    values: NDArray[np.float32] | None = None
    """[A] the measure of every answer token; None for VIG."""
    lowest: float | None = None
    """The lowest threshold of a source, where quotas give the sources different thresholds; None without quotas."""

    def __repr__(self) -> str:
        lines = [f"Selection from {len(self.scores):,} scored records", *str(self.summary()).splitlines()]
        return "\n".join(lines if len(lines) <= 10 else [*lines[:9], f"  and {len(lines) - 9} more sources; summary() shows all"])

    def _repr_html_(self) -> str:
        from vig.notebook import selection_html  # only notebooks need it

        return selection_html(self.summary())

    @cached_property
    def source_codes(self) -> tuple[list[str], NDArray[np.int64]]:
        """Return the sources, and [N] the index of each record's source among them; see the function of this name."""
        return source_codes(self.scores, self.sources)

    @property
    def sample_ids(self) -> list[str]:
        return list(self.token_masks)

    def summary(self) -> Summary:
        """Count everything, and each source in the order of the alphabet."""
        names, codes = self.source_codes
        lengths = np.diff(self.scores.bounds)  # [N]
        tokens = _sums(self.token_masks.flat, self.scores.bounds)  # [N]
        columns = (self.token_masks.chosen, np.ones(len(codes)), tokens, lengths)  # arrays [N], in the order of `Counts`
        by_source = [np.bincount(codes, column, len(names)).astype(int).tolist() for column in columns]
        samples_kept, samples_total, tokens_kept, tokens_total = map(sum, by_source)
        return Summary(
            samples_kept,
            samples_total,
            tokens_kept,
            tokens_total,
            threshold=self.threshold,
            lowest=self.lowest,
            measure="VIG" if self.by == "vig" else self.by,
            failed=len(self.scores.failures),
            text_only=len(self.scores.manifest["text_only"]),
            sources={name: Counts(*row) for name, *row in zip(names, *by_source, strict=True)} if self.sources else {},
            helped_left_out=self._helped_left_out(),
            by_accident=self._by_accident(),
        )

    def _helped_left_out(self) -> float:
        """Return the share of the kept samples' tokens that the image helped and the mask leaves out; 0 for a measure without a zero."""
        measure = MEASURES.get(self.by)
        if self.threshold is None or measure is None or measure.neutral is None or measure.tokens is None:
            return 0.0
        helped = (self.scores.token_vig if self.values is None else self.values) > measure.neutral  # [A]
        left_out = helped > self.token_masks.flat  # [A]
        helped_count, left_out_count = (_sums(tokens, self.scores.bounds)[self.token_masks.chosen].sum() for tokens in (helped, left_out))
        return float(left_out_count / max(helped_count, 1))

    def _by_accident(self) -> float:
        """Return the share of the kept samples whose words are unlikely, and not among as many samples that became most probable.

        The result is 0 for a measure without a zero. With quotas, as many samples of each source are compared.
        """
        chosen, loss = self.token_masks.chosen, self.scores.loss  # [N], [N]
        measure = MEASURES.get(self.by)
        if self.threshold is None or measure is None or measure.neutral is None or len(chosen) < FEWEST:
            return 0.0
        rise = np.exp(-loss) - np.exp(-(loss + self.scores.vig))  # [N], of the geometric mean of a sample's probabilities
        codes = self.source_codes[1] if self.lowest is not None else np.zeros(len(chosen), np.int64)  # [N]
        order = np.lexsort((rise, codes))  # the lowest rise of each source first
        codes, chosen, loss = codes[order], chosen[order], loss[order]
        place = np.arange(len(codes)) - np.searchsorted(codes, codes)  # [N] place in the source
        left_out = place < np.bincount(codes, ~chosen)[codes]
        return float((chosen & left_out & (loss >= UNLIKELY)).sum() / max(chosen.sum(), 1))

    def weighted(self, low: float, high: float) -> Selection:
        """Return this selection with token weights in place of a hard mask: each token counts by its VIG, or by the measure `by`.

        The weight of a supervised token is its value, clamped to `low` and `high`, divided by the mean of all clamped values. So a
        weight is 1 on average. The values of "cal" lie between 1/3 and 5, so that these two leave them as they are. End-of-turn
        tokens weigh 1: the model learns when to stop as in plain training.

        Raises:
            ValueError: unless 0 < low <= high < infinity.
        """
        if not 0 < low <= high < math.inf:
            raise ValueError(f"token weights are clamped to 0 < low <= high; got {low} and {high}")
        inner = self.token_masks.flat.copy()  # [A]
        inner[self.scores.turn_ends] = False
        clamped = (self.scores.token_vig if self.values is None else self.values).clip(low, high)  # [A]
        mean = clamped[inner].mean(dtype=np.float64) if inner.any() else 1.0
        weights = np.where(inner, clamped / mean, self.token_masks.flat).astype(np.float32)  # [A]
        return dataclasses.replace(self, token_weights=PerToken(self.scores, self.token_masks.chosen, weights))

    def apply(self, records: Iterable[RawRecord]) -> Any:
        """Return the records to train on, in order. They are a list; for a data set of Hugging Face, they are a data set without format.

        Chosen records get a "token_mask" (or "token_weights") and, under "scored_digest", the digest of the record that it belongs to.
        Text-only records stay as they are. All others are left out: records that were not chosen or could not be scored, and (with a
        warning) records that were never scored though they have an image, or that cannot be read.

        Raises:
            ValueError: for a record that has changed since it was scored, or if the scoring run met none of the records.
        """
        given = opened(records)
        if is_data_set(given, "IterableDataset"):
            return given.from_generator(self.applied, gen_kwargs={"records": given})
        if not is_data_set(given, "Dataset"):
            return list(self.applied(given))
        given = with_numbered_ids(given)
        return with_entries(given, self._kept(given))

    def applied(self, records: Iterable[RawRecord], *, as_scored: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the records that `apply` returns, without holding them in memory.

        Args:
            as_scored: whether the records are known to be the records that were scored, so that their digests need not be compared.
        """
        return ({**record, **entries} for _, record, entries in self._kept(records, as_scored))

    def _kept(self, records: Iterable[RawRecord], as_scored: bool = False) -> Iterator[tuple[int, Mapping[str, Any], dict[str, Any]]]:
        """Yield place, record and new entries of each record that `apply` returns."""
        places, digests = self.scores.places, self.scores.digests
        failures, text_only = self.scores.failures, set(self.scores.manifest["text_only"])
        key, values = ("token_mask", self.token_masks) if self.token_weights is None else ("token_weights", self.token_weights)
        arrays: list[Any] = [values.chosen, values.flat, self.scores.bounds]
        chosen, flat, bounds = [memoryview(array) for array in arrays]  # faster than arrays, value by value
        known = unknown = 0
        for row, (id, record) in enumerate(rows_by_id(records)):
            place = places.get(id)
            if place is not None:
                known += 1
                given = digests[place] if as_scored else digest(record)
                if given != digests[place] and not was_scored(record, given, digests[place]):
                    raise ValueError(f"record {id!r} is not what was scored; {AS_SCORED}")
                if chosen[place]:
                    own = unselected(_as_mapping(record, id))
                    scored = given if own is record else digest(own)  # a digest takes its time
                    yield row, own, {key: flat[bounds[place] : bounds[place + 1]].tolist(), SCORED: scored}
            elif id in failures:
                known += 1
            elif id in text_only or _is_text_only(record):
                known += id in text_only
                yield row, _as_mapping(record, id), {}
            else:
                unknown += 1
        if not known:
            raise ValueError(f"the scoring run met none of these records; {AS_SCORED}")
        if unknown:
            logger.warning(
                "%d records have no score though they have an image, or cannot be read; they are left out of the training set", unknown
            )


def was_scored(record: RawRecord | UnreadableRow, given: str, scored: str) -> bool:
    """Return whether a record with the digest `given` is the record that was scored, which had the digest `scored`.

    It may have got further entries since, such as a source or a token mask, but no entry on which the scores depend.
    """
    if given == scored or not isinstance(record, Mapping):
        return given == scored
    more = [key for key in record if key not in CONTENT]
    choices = itertools.chain.from_iterable(itertools.combinations(more, count) for count in range(len(more), 0, -1))
    added = itertools.islice(choices, MOST_CHOICES)
    return any(digest({key: value for key, value in record.items() if key not in keys}) == scored for keys in added)


def _sums(mask: NDArray[np.bool_], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [N], the number of True values of each record in `mask` [A]. Blocks of records keep numpy's copies small."""
    sums = []
    for start in range(0, len(bounds) - 1, BLOCK):
        inside = bounds[start : start + BLOCK + 1] - bounds[start]
        block = np.append(mask[bounds[start] : bounds[start] + inside[-1]], False)
        sums.append(np.add.reduceat(block, inside[:-1], dtype=np.int64) * (np.diff(inside) > 0))
    return np.concatenate([np.empty(0, np.int64), *sums])


def source_codes(scores: Scores, sources: Mapping[str, str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the sources of the scored records in the order of the alphabet, and [N] the index of each record's source among them."""
    if not sources:
        return [NO_SOURCE], np.zeros(len(scores), np.int64)
    named = [sources.get(id, NO_SOURCE) for id in scores.ids]
    names = sorted(set(named))
    places = {name: place for place, name in enumerate(names)}
    return names, np.array([places[name] for name in named], np.int64)


def _as_mapping(record: Any, id: str) -> Mapping[str, Any]:
    """Return the record as a mapping: a list of messages has no place for a mask."""
    return record if isinstance(record, (dict, Mapping)) else {"id": id, "messages": record}


def _is_text_only(record: Any) -> bool:
    """Return whether training can take the record without a score: it is readable and has an answer and no image."""
    try:
        read = to_record(record)
    except RecordError:
        return False
    return not read.images and any(message["role"] == "assistant" for message in read.messages)
