"""`choose` takes the blind pairs with the largest gap, in bounded memory, and not too many similar pairs.

All rules walk the pairs from the largest gap down. Whether they take a pair depends only on the pairs that were taken before. A window
of the best pairs is therefore enough to start with. If it is used up, the pairs behind it are looked up again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mof.pairs.core_threads import on_one_core
from mof.pairs.embedding_rows import EmbeddingRows
from mof.pairs.projection import sieve
from mof.pairs.sieve import FullComparison, Sieve, tiles

# Shapes: M pairs, L images.

PAIR = np.dtype([("i", "<i8"), ("j", "<i8"), ("clip", "<f4"), ("dino", "<f4")])
"""A pair, as it is held and stored."""
WINDOW = 4_000_000
"""Pairs held at a time for the rules: 100 MB."""
SPARE = 100_000
"""Pairs that are held, beyond twice the number to keep, before the worse pairs are dropped."""


@dataclass
class BestPairs:
    """BestPairs holds the `most` best of all pairs that are added (None: all of them), and the number of added pairs."""

    most: int | None = None
    after: NDArray | None = None
    """[1] a pair: only pairs that rank behind it are held"""
    total: int = 0
    _held: list[NDArray] = field(default_factory=list)
    _count: int = 0

    def add(self, pairs: NDArray, total: int) -> None:
        """Add pairs [M] PAIR, in any order, which are the best of `total`."""
        self.total += total
        if self.after is not None and len(pairs):
            pairs = pairs[_behind(pairs, self.after)]
        self._held.append(pairs)
        self._count += len(pairs)
        if self.most is not None and self._count > 2 * self.most + SPARE:
            self._held = [self.ranked()]
            self._count = len(self._held[0])

    def ranked(self) -> NDArray:
        """Return the pairs [at most `most`] by gap, largest first; equal gaps by i, then j."""
        pairs = np.concatenate([np.empty(0, PAIR), *self._held])
        return pairs[np.lexsort((pairs["j"], pairs["i"], pairs["dino"] - pairs["clip"]))][: self.most]


@dataclass
class Rules:
    """Rules say which pairs are left out; the fields are the arguments of `blind_pairs`.

    Raises:
        ValueError: for a value that no pair can meet.
    """

    max_pairs: int | None = None
    one_per_image: bool = False
    duplicates_above: float | None = None
    per_cluster: int | None = None

    def __post_init__(self) -> None:
        if self.max_pairs is not None and self.max_pairs < 0:
            raise ValueError(f"max_pairs must not be negative, got {self.max_pairs}")
        if self.per_cluster is not None and self.per_cluster < 1:
            raise ValueError(f"per_cluster must be at least 1, got {self.per_cluster}")
        if self.duplicates_above is not None and not -1 <= self.duplicates_above <= 1:
            raise ValueError(f"duplicates_above is a cosine, got {self.duplicates_above}")

    @property
    def any(self) -> bool:
        """Return whether there is a rule besides the number of pairs."""
        return self.one_per_image or self.duplicates_above is not None or self.per_cluster is not None

    @property
    def most(self) -> int | None:
        """Return the number of the best pairs that must be held."""
        return max(self.max_pairs, WINDOW) if self.any and self.max_pairs else self.max_pairs

    @property
    def most_per_tile(self) -> int | None:
        """Return the number of the best pairs of a part of all pairs that must be kept."""
        return None if self.any else self.max_pairs


def choose(
    found: Callable[[], Iterable[tuple[NDArray, int]]], rules: Rules, clips: list[EmbeddingRows], alike: list[EmbeddingRows], above: float
) -> tuple[NDArray, int]:
    """Return the chosen pairs [M] PAIR by rank, and the number of pairs that were found.

    Args:
        found: looks all pairs up again when it is called, and returns parts of them, each with the number of its pairs.
        clips: encoders that tell clusters, by cosine > `above`.
        alike: encoders that tell duplicates.
    """
    chosen, window, images = np.empty(0, PAIR), BestPairs(rules.most), np.empty(0, np.int64)
    walk = _Walk(rules)
    while True:
        for pairs, total in found():
            window.add(pairs, total)
        ranked = window.ranked()  # [M]
        if not rules.any:
            return ranked, window.total
        images = in_order(images, ranked["i"], ranked["j"])  # [L]
        same = None if rules.duplicates_above is None else leaders(alike, images, rules.duplicates_above)
        cluster = None if rules.per_cluster is None else leaders(clips, images, above)
        chosen = np.concatenate([chosen, walk.take(ranked, same, cluster)])
        enough = rules.max_pairs is not None and len(chosen) >= rules.max_pairs
        if enough or window.most is None or len(ranked) < window.most:
            return chosen, window.total
        window = BestPairs(rules.most, after=ranked[-1:])


class _Walk:
    """_Walk walks down the ranking, and remembers the pairs that it took."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._used: set[int] = set()
        self._shown: set[tuple[int, int]] = set()
        self._clusters: Counter[int] = Counter()
        self._taken = 0

    def take(self, ranked: NDArray, same: dict[int, int] | None, cluster: dict[int, int] | None) -> NDArray:
        """Return the pairs that are taken of the next part of the ranking; `same` and `cluster` name each image's leader."""
        images = zip(ranked["i"].tolist(), ranked["j"].tolist(), strict=True)
        return ranked[np.array([self._takes(i, j, same, cluster) for i, j in images], dtype=bool)]

    def _takes(self, i: int, j: int, same: dict[int, int] | None, cluster: dict[int, int] | None) -> bool:
        if self._taken == self._rules.max_pairs:
            return False
        group = cluster[i] if cluster else -1
        a, b = (same[i], same[j]) if same else (i, j)
        shown = (min(a, b), max(a, b))
        if a == b or shown in self._shown or (self._rules.one_per_image and (a in self._used or b in self._used)):
            return False
        if self._rules.per_cluster is not None and self._clusters[group] == self._rules.per_cluster:
            return False
        self._taken += 1
        self._clusters[group] += 1
        self._shown.add(shown)
        self._used.update(shown)
        return True


def leaders(encoders: list[EmbeddingRows], images: NDArray[np.int64], above: float, tile: int = 1024) -> dict[int, int]:
    """Return the leader of each image: the first of `images` [L] that leads itself and has cosine > `above` with it in all `encoders`.

    An image without a leader leads itself. Unlike linkage, this does not join a chain of small differences into a group.
    """
    index = torch.from_numpy(images)
    rows = [EmbeddingRows(encoder.take(index), encoder.name, encoder.device) for encoder in encoders]
    close = sieve(rows, above)
    leader = on_one_core(lambda: _lead(rows, close, above, tile), rows[0].device)  # [L]
    return dict(zip(images.tolist(), images[leader.numpy()].tolist(), strict=True))


def _lead(encoders: list[EmbeddingRows], close: Sieve | FullComparison, above: float, tile: int) -> Tensor:
    """Return the leader of each row, shape [L]."""
    count = len(encoders[0])
    leader = torch.arange(count)  # [L]
    for rows, columns in tiles(range(count), range(count), tile):
        i, j = (index.cpu() for index in close.close(rows, columns))
        free = (leader[i] == i) & (leader[j] == j)
        i, j = i[free], j[free]
        for encoder in encoders:
            near = encoder.cosines(i, j) > above
            i, j = i[near], j[near]
        for a, b in zip(i.tolist(), j.tolist(), strict=True):  # sorted by i, then j: an image's leader is known before it is needed
            if leader[a] == a and leader[b] == b:
                leader[b] = a
    return leader


def in_order(images: NDArray[np.int64], i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `images`, and behind them the other images of the pairs in order of appearance, shape [L]."""
    repeated = np.concatenate([images, np.stack([i, j], 1).ravel()])
    return repeated[np.sort(np.unique(repeated, return_index=True)[1])]


def _behind(pairs: NDArray, mark: NDArray) -> NDArray[np.bool_]:
    """Return whether each pair ranks behind the pair `mark` [1], shape [M]."""
    gap, limit = pairs["clip"] - pairs["dino"], mark["clip"] - mark["dino"]
    later = (pairs["i"] > mark["i"]) | ((pairs["i"] == mark["i"]) & (pairs["j"] > mark["j"]))
    return (gap < limit) | ((gap == limit) & later)
