"""Work that is spread over the cores item by item, instead of each operation over all cores.

The operations of the search take well under a millisecond. Threads that meet after each operation would mostly wait for each other,
above all on a machine that runs other programs too: there, the search takes ten times as long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_each_core(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """Yield the result of `work` for each item, in order. The CPU works on as many items at a time as torch has threads.

    A few items are taken ahead, so the results that wait take bounded memory. On other devices, one item follows the other.
    """
    cores = torch.get_num_threads()
    if cores == 1 or device.type != "cpu":
        yield from map(work, items)
        return
    ahead: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(cores, initializer=_use_one_core, initargs=(cores,))
    try:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 2 * cores:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def on_one_core(work: Callable[[], Result], device: torch.device) -> Result:
    """Return the result of `work`, all of whose operations run in one thread."""
    [result] = on_each_core(lambda _: work(), [None], device)
    return result


def _use_one_core(cores: int) -> None:
    """Let this thread run its operations alone.

    Torch notes the number for threads that begin later, too. A thread that ends at once sets that number back.
    """
    torch.get_num_threads()  # otherwise torch would set the number of this thread again at its first operation
    torch.set_num_threads(1)
    reset = Thread(target=torch.set_num_threads, args=[cores])
    reset.start()
    reset.join()
