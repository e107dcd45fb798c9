"""A training that diverges stops, before numbers that are not finite reach a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mof.data.records import record_id

RECORD_IDS = "record_ids"  # the key of a batch under which `NamedBatches` puts the records' ids
MOST_NAMED = 20  # records in a message


class DivergenceError(ValueError):
    """A loss, a gradient or a weight that is not finite. The message says at which step, and names the records."""


class NamedBatches:
    """Gives the batches of another collator, with the ids of their records beside the tensors."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, records: Sequence[Any]) -> dict[str, Any]:
        return {**self.collator(records), RECORD_IDS: [record_id(record) for record in records]}


class Watch:
    """The losses and gradients that were not looked at yet: the device may still be at work on them, and no step is to wait for it."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, str, Sequence[str], Tensor | float]] = []

    def add(self, step: int, what: str, records: Sequence[str], value: Tensor | float) -> None:
        """Take a number that `check` will look at: `what` it is, at which step, and from which records it came."""
        self._pending.append((step, what, records, value))

    def check(self, then: Callable[[], str]) -> None:
        """Look at all numbers since the last call. It waits for the device.

        Args:
            then: gives the end of the message: what is left of the training.

        Raises:
            DivergenceError: for the first number that is not finite.
        """
        pending, self._pending = self._pending, []
        for step, what, records, value in pending:
            if not math.isfinite(float(value)):
                raise DivergenceError(f"the training diverged: {what} of step {step} is {float(value)}, {named(records)}; {then()}")


def named(records: Sequence[str]) -> str:
    """Return "with the records 'a', 'b'", cut after `MOST_NAMED` records."""
    more = f" and {len(records) - MOST_NAMED} more" if len(records) > MOST_NAMED else ""
    return f"with the records {', '.join(map(repr, records[:MOST_NAMED]))}{more}" if records else "with records of another process"


@torch.no_grad()
def not_finite(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the weights that hold a number which is not finite."""
    finite = [(name, weight.isfinite().all()) for name, weight in weights]
    return [name for name, good in finite if not bool(good)]
