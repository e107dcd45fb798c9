"""Position tables of towers that keep them as a parameter for one grid, resampled for another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Grid = tuple[int, int]


class Positions:
    """Resamples a position table always from the one that was loaded or trained, never from a resampled one.

    So resizing to a and then to b gives the same encoder as resizing to b, and back to the first size the first table.
    """

    def __init__(self) -> None:
        self._source: tuple[Tensor, Grid] | None = None
        self._made: Tensor | None = None

    def resampled(self, table: nn.Parameter, grid: Grid, resample: Callable[[Tensor, Grid], Tensor]) -> nn.Parameter:
        """What to put in the place of `table`, which is for `grid`; `resample(table, its grid)` does the work."""
        if self._source is None or not self._is_made(table):
            self._source = table.detach().clone(), grid
        source, source_grid = self._source
        made = resample(source.to(table), source_grid).detach()
        self._made = made.clone()
        return nn.Parameter(made, requires_grad=table.requires_grad)

    def _is_made(self, table: Tensor) -> bool:
        """Whether `table` is still what `resampled` gave: no other weights loaded, no training since."""
        if self._made is None or self._made.is_meta or table.is_meta or self._made.shape != table.shape:
            return False
        return torch.equal(self._made.to(table), table)
