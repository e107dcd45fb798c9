"""The processes that torchrun or accelerate started work together: they exchange values, and wait for each other.

torch is imported late, because a process that is alone, for example a selection from scores, does not need it.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Processes tells this process its place among the processes that work together. By default it is alone."""

    rank: int = 0
    count: int = 1
    group: Any = None
    """A process group beside accelerate's group. In accelerate's group a wait ends after 10 to 30 minutes and may need an accelerator.
    In this group a process may wait for hours until the others have scored their records."""

    @classmethod
    def all(cls) -> Processes:
        """Return the processes that torchrun or accelerate started. All of them must call this. A process that is alone sets up nothing."""
        import torch
        import torch.distributed as dist
        from accelerate import PartialState

        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls()
            PartialState(cpu=not torch.accelerator.is_available())  # starts the default group
        if dist.get_world_size() == 1:
            return cls()
        atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=timedelta(days=30)))

    def gather(self, value: T) -> list[T]:
        """Return, on all processes, the values that the processes give here, in the order of the processes."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_first(self, work: Callable[[], object]) -> None:
        """Do the work on the first process while the others wait. If it raises an error, all processes raise it."""
        failure: Exception | None = None
        if self.rank == 0:
            try:
                work()
            except Exception as error:
                failure = error
        failure = self.gather(failure)[0]
        if failure is not None:
            raise failure

    def require_equal(self, value: Any, name: str) -> None:
        """Raise a ValueError on all processes unless all give the same value."""
        if any(given != value for given in self.gather(value)):
            raise ValueError(f"{self.count} processes score together, but {name} are not the same on all of them")

    def close(self) -> None:
        """Free the group. All processes must call this."""
        if self.group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(self.group)


def _leave() -> None:
    """Leave the default group before the process ends, because a thread of gloo may abort a process that is still in the group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
