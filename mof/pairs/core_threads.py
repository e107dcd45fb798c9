"""One piece of work per core, rather than every operation spread over all cores.

Where operations take well under a millisecond, threads that meet after each of them spend their time waiting for each other, the more
so on a machine that runs other things too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_each_core(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """`work` of each item, in order, as many at a time as torch has threads; on a device other than the CPU, one at a time.

    A few items are taken ahead, so results that wait take bounded memory.
    """
    cores = torch.get_num_threads()
    if cores == 1 or device.type != "cpu":
        yield from map(work, items)
        return
    ahead: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 2 * cores:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # the matrix library has one number for all threads


def on_one_core(work: Callable[[], Result], device: torch.device) -> Result:
    """`work`, all of its operations in one thread."""
    [result] = on_each_core(lambda _: work(), [None], device)
    return result


__all__ = ["on_each_core", "on_one_core"]
