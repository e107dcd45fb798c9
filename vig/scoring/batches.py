"""Records with the same images form a group. Groups of similar length go through the model together, as a batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mof.data.digests import digest
from mof.data.records import images_of
from mof.data.rows import Row
from vig.scoring.pairs import Pair


@dataclass(frozen=True)
class Batch:
    """A batch is the input of a forward pass.

    The records of a group share their images and their first `prefix` tokens. With a prefix of 0 they share nothing.
    """

    groups: list[list[Pair]]
    prefix: int

    @property
    def pairs(self) -> list[Pair]:
        return [pair for group in self.groups for pair in group]

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the model computes: each prefix once, and the rest of each record padded to the longest."""
        rest = max(len(pair.clean.input_ids) for pair in self.pairs) - self.prefix
        return self.prefix * len(self.groups) + rest * len(self.pairs)


def make_batches(pairs: Iterable[Pair], batch_tokens: int, batch_size: int) -> list[Batch]:
    """Make batches of at most `batch_tokens` tokens and `batch_size` records, but at least one record."""
    groups = [half for group in _sharing(pairs) for half in _fitting(group, batch_tokens, batch_size)]
    groups.sort(key=lambda batch: (batch.prefix, max(len(pair.clean.input_ids) for pair in batch.pairs)))
    batches: list[Batch] = []
    for group in groups:
        joined = Batch(batches[-1].groups + group.groups, group.prefix) if batches else group
        fits = joined.tokens <= batch_tokens and len(joined.pairs) <= batch_size
        if batches and batches[-1].prefix == group.prefix and fits:
            batches[-1] = joined
        else:
            batches.append(group)
    return batches


def _sharing(pairs: Iterable[Pair]) -> list[Batch]:
    """Return a batch for each set of records with the same images and the same tokens up to the last image."""
    groups: dict[tuple[Any, ...], list[Pair]] = {}
    for index, pair in enumerate(pairs):
        start = tuple(pair.clean.input_ids[: pair.prefix].tolist())
        groups.setdefault((pair.images, start) if pair.prefix else (index,), []).append(pair)
    return [Batch([group], group[0].prefix if len(group) > 1 else 0) for group in groups.values()]


def _fitting(batch: Batch, batch_tokens: int, batch_size: int) -> Iterator[Batch]:
    """Yield the batch of one group, cut in halves until each part fits."""
    (group,) = batch.groups
    if len(group) == 1:
        yield Batch([group], 0)
    elif batch.tokens <= batch_tokens and len(group) <= batch_size:
        yield batch
    else:
        group = sorted(group, key=lambda pair: len(pair.clean.input_ids))
        middle = len(group) // 2
        for half in (group[:middle], group[middle:]):
            yield from _fitting(Batch([half], batch.prefix), batch_tokens, batch_size)


def by_image(records: Sequence[Row]) -> list[Row]:
    """Sort records by the place where their images occur first, so that records with the same images are neighbours."""
    places: dict[Any, int] = {}

    def place(raw: Row) -> int:
        return places.setdefault(tuple(map(_name, images_of(raw))) or id(raw), len(places))

    return sorted(records, key=place)


def _name(image: Any) -> Any:
    """Return a key that is equal for the same file, or for the same object in memory."""
    if isinstance(image, (str, os.PathLike)):
        return str(image)
    return id(image) if isinstance(image, Image.Image) else digest(image)


def windows(pairs: Iterable[Pair | None], tokens: int, records: int) -> Iterator[list[Pair | None]]:
    """Cut a stream into windows, which end at this number of tokens or records. A window is in memory while its batches are made."""
    window: list[Pair | None] = []
    held = 0
    for pair in pairs:
        window.append(pair)
        held += 0 if pair is None else len(pair.clean.input_ids)
        if held >= tokens or len(window) >= records:
            yield window
            window, held = [], 0
    if window:
        yield window
