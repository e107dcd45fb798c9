"""Several processes that score together: how they tell each other what each has done, and wait."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that work together; one that is alone by default."""

    rank: int = 0
    count: int = 1
    group: Any = None
    """A group of their own: what they wait for may take hours, and needs no accelerator."""

    @classmethod
    def all(cls) -> Processes:
        """Those that torchrun or accelerate started. All of them must come here."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=timedelta(days=30)))

    def gather(self, value: T) -> list[T]:
        """What each process gives here, on all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_first(self, work: Callable[[], None]) -> None:
        """Done by the first process while the others wait. What it raises is raised by all."""
        failure: Exception | None = None
        if self.rank == 0:
            try:
                work()
            except Exception as error:
                failure = error
        failure = self.gather(failure)[0]
        if failure is not None:
            raise failure

    def require_equal(self, value: Any, what: str) -> None:
        """ValueError on all processes unless all give the same value."""
        if any(other != value for other in self.gather(value)):
            raise ValueError(f"{self.count} processes score together, but {what} are not the same on all of them")

    def close(self) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)
