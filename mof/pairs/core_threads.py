"""These functions spread work over the cores item by item, instead of spreading each operation over all cores.

The operations of the search take well under a millisecond. Threads that meet after each operation would mostly wait for each other,
above all on a machine that runs other programs too: there, the search takes ten times as long.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from encoders.images.loader import in_order

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_each_core(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """Return an iterator over the result of `work` for each item, in order. The CPU works on as many items at a time as torch has threads.

    A few items are taken ahead, so the results that wait take bounded memory. On other devices, the items are worked on one by one.
    """
    cores = torch.get_num_threads()
    return map(work, items) if cores == 1 or device.type != "cpu" else in_order(work, items, cores, 2 * cores, _use_one_core)


def on_one_core(work: Callable[[], Result], device: torch.device) -> Result:
    """Return the result of `work`. All its operations run in one thread."""
    [result] = on_each_core(lambda _: work(), [None], device)
    return result


def _use_one_core() -> None:
    """Let this thread run its operations alone. `torch.set_num_threads` would set the number of the program's later threads, too."""
    torch.get_num_threads()  # otherwise torch would set the number of this thread again at its first operation
    for set_number in _setters():
        set_number(1)


@cache
def _setters() -> list[Callable[[int], Any]]:
    """Return the functions of OpenMP and of torch's matrix library that set the number of the calling thread alone.

    If torch was built without them, its operations take all cores: the search is slower, and its result is the same.
    """
    files = [file for file in Path(torch.__file__).parent.glob("lib/*torch_cpu.*") if file.suffix in (".so", ".dylib", ".dll")]
    libraries = [ctypes.CDLL(str(file)) for file in files]
    names = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")
    return [getattr(library, name) for library in libraries for name in names if hasattr(library, name)]
