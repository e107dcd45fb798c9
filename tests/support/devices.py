"""Devices that tests compare with the CPU, and the waits of a program for its device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = {"atol": 1e-4, "rtol": 1e-4}
"""Largest difference between two devices in float32, without TF32."""
HALF = 0.05
"""Largest difference in bfloat16, as a share of the norm of all values together: 8 bits are kept of each, through a few blocks."""
COMPILER = {"cpu": "aot_eager", "cuda": "inductor"}
"""torch.compile's backend in tests: a CPU would spend its time in a C++ compiler."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices as float32, as CPUs do, while the context is open."""
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    for part in parts:
        part.allow_tf32 = False
    try:
        yield
    finally:
        for part, allowed in zip(parts, before, strict=True):
            part.allow_tf32 = allowed


class Waits(TorchDispatchMode):
    """Counts what would make a program wait for a GPU while it is open: reading a number, counting elements, copying to the CPU.

    These operators also run on a CPU, so that the counts can be tested without a GPU.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        copies = name in ("_to_copy", "copy_") and not kwargs.get("non_blocking", len(args) > 2 and args[2])
        if name in self.NAMES or (copies and self._leaves_the_gpu(name, args, kwargs)):
            self.seen.append(name)
        return func(*args, **kwargs)

    @staticmethod
    def _leaves_the_gpu(name: str, args: Any, kwargs: Any) -> bool:
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        return source.device.type == "cuda" and target.type == "cpu"


def waits(device: str, run: Callable[[], object]) -> int:
    """Return how often `run` waits for the device: as `Waits` counts, and on a GPU as CUDA itself tells, if that is more."""
    with Waits() as counted:
        run()
    if device != "cuda":
        return len(counted.seen)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return max(len(counted.seen), sum("synchroniz" in str(warning.message) for warning in told))
