"""PairComparison compares all images with all. The sieve lets few pairs through, whose cosines are computed in full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.progress import progress_bar
from mof.pairs.choice import PAIR
from mof.pairs.core_threads import on_each_core
from mof.pairs.embedding_rows import EmbeddingRows
from mof.pairs.projection import sieve
from mof.pairs.sieve import FullComparison, Sieve, tiles

# Shapes: M pairs, S survivors of the sieve.

BATCH = 1 << 16
"""Number of survivors of the sieve whose cosines are computed at a time."""
TILE, GPU_TILE = 1024, 16384
"""Number of rows that are compared at a time: a multiple of 32, see the sieve."""
GROUP, GPU_GROUP = 4, 16
"""Tiles that a thread, or a GPU, compares at a time."""
Count = Callable[[int, int], None]
"""A function that takes the numbers of pairs that were compared and found since its last call."""


class PairComparison:
    """PairComparison finds all pairs of images with cosines above `above` in all of `clips` and below `below` in all of `dinos`."""

    def __init__(self, clips: list[EmbeddingRows], dinos: list[EmbeddingRows], above: float, below: float) -> None:
        self.clips, self.dinos, self.above, self.below = clips, dinos, above, below
        self.device = clips[0].device
        self.tile = TILE if self.device.type == "cpu" else GPU_TILE
        self.images = len(clips[0])

    def moved(self, device: str) -> PairComparison:
        """Return the comparison on another device."""
        clips, dinos = ([rows.moved(device) for rows in encoders] for encoders in (self.clips, self.dinos))
        return PairComparison(clips, dinos, self.above, self.below)

    @cached_property
    def sieve(self) -> Sieve | FullComparison:
        return sieve(self.clips, self.above, self.dinos[0], self.below)

    def found(self, progress: bool = False) -> Iterator[tuple[NDArray, int]]:
        """Yield parts of the pairs, in any order: the best pairs of a part, [M] PAIR (here: all), and the number of its pairs."""
        with pair_progress(self.images, progress) as count:
            yield from self.within(range(self.images), range(self.images), count)

    def within(self, rows: range, columns: range, count: Count) -> Iterator[tuple[NDArray, int]]:
        """Yield the pairs with i in `rows` and j in `columns`, as `found` does.

        Args:
            count: is called after each part.
        """
        assert self.sieve is not None  # made before threads would ask for it
        squares = tiles(rows, columns, self.tile)
        size = GROUP if self.device.type == "cpu" else GPU_GROUP
        groups = iter(lambda: list(islice(squares, size)), [])
        for pairs, compared in on_each_core(self._compare, groups, self.device):
            count(compared, len(pairs))
            yield pairs, len(pairs)

    def _compare(self, squares: list[tuple[slice, slice]]) -> tuple[NDArray, int]:
        """Return the blind pairs in these squares, [M] PAIR, and the number of compared pairs."""
        survivors = (zip(i.split(BATCH), j.split(BATCH), strict=True) for i, j in self.sieve.close_in(squares))
        pairs = [self._blind(i, j) for parts in survivors for i, j in parts]
        return np.concatenate([np.empty(0, PAIR), *pairs]), sum(pairs_in(*square) for square in squares)

    def _blind(self, i: Tensor, j: Tensor) -> NDArray:
        """Return the blind pairs among the survivors (i [S], j [S]), [M] PAIR."""
        clip = torch.full([len(i)], torch.inf)  # [S]
        for rows in self.clips:
            clip = torch.minimum(clip, rows.cosines(i, j))
            near = clip > self.above
            i, j, clip = i[near.to(i.device)], j[near.to(j.device)], clip[near]
        dino = torch.full([len(i)], -torch.inf)
        for rows in self.dinos:
            dino = torch.maximum(dino, rows.cosines(i, j))
            far = dino < self.below
            i, j, clip, dino = i[far.to(i.device)], j[far.to(j.device)], clip[far], dino[far]
        pairs = np.empty(len(i), PAIR)
        for name, column in zip(("i", "j", "clip", "dino"), (i.cpu(), j.cpu(), clip, dino), strict=True):
            pairs[name] = column.numpy()
        return pairs


def pairs_in(rows: slice, columns: slice) -> int:
    """Return the number of pairs i < j that a square on or above the diagonal holds."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    return height * (height - 1) // 2 if rows == columns else height * width


@contextmanager
def pair_progress(images: int, shown: bool) -> Iterator[Count]:
    """Show the numbers of pairs that were compared and found; yield the function that counts them."""
    compared = found = 0
    with progress_bar("pairs", images * (images - 1) // 2, shown) as advance:

        def count(more_compared: int, more_found: int) -> None:
            nonlocal compared, found
            compared, found = compared + more_compared, found + more_found
            advance(compared, f"{found:,} found")

        yield count
