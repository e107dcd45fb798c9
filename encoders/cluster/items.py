"""An item is work that does not depend on other items. Its results are in a file, so that a killed run goes on with the other items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

PARTS = 32
"""An item is at most this fraction of the work before it, so that a kill costs little and this number of actors have work early."""


class Item(Protocol):
    """An item is work that does not depend on other items."""

    def halves(self) -> list[Any]:
        """Return two smaller items; none for an item that cannot be divided."""


Given = TypeVar("Given", bound=Item)
Result = TypeVar("Result")
Work = Callable[[Given], Result]


@dataclass(frozen=True)
class GivenUp:
    """GivenUp stands for the result of an item that killed every process that worked on it."""

    reason: str


Parts = list[tuple[Given, Result | GivenUp]]
"""The results of an item: its own result, or the results of the parts that it was divided into."""


def grown(position: int, least: int, most: int) -> int:
    """Return the size of the item that begins at this position of the work: a multiple of `least`, unless that is above `most`."""
    return max(least, min(most, position // PARTS) // least * least)


def file_number(item: int, part: int = 1) -> int:
    """Return the number of the file of an item. Parts (the halves of part n are 2n and 2n + 1) have numbers that no item has."""
    return item if part == 1 else 10**9 + 2**16 * item + part
