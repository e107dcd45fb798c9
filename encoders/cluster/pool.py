"""Items are worked on in this process, or by the actors of a Ray cluster.

Ray places the actors and moves the data. The rules for items are here: the item of a lost machine is done again; an item that kills its
processes is halved until the part that kills them is alone, and this part is given up.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from encoders.cluster.actor import Actor, Parcel
from encoders.cluster.address import Cluster
from encoders.cluster.items import Given, GivenUp, Parts, Result, Work
from encoders.images.loader import in_order

logger = logging.getLogger(__name__)

DEATHS = 2
"""An item that killed this number of processes is halved; each of its parts may kill one more process."""
STARTS = 5
"""The run ends if this number of processes in a row die before they can work."""
READY = 2
"""Items that lie ready in Ray's memory for the processes that become free next."""
PATIENCE = 60.0
"""Seconds without any process after which a warning says that the cluster may have no room."""


def worked(
    make: Callable[[], Work[Given, Result]], items: Iterable[Given], cluster: Cluster | None = None, lanes: int = 1
) -> Generator[tuple[Given, Parts]]:
    """Do the work on all items. Yield each item with its results, in the order of the items.

    Args:
        make: makes the function that does the work, in each process. With a cluster, it is sent there, with all that it holds.
        items: are taken as they are needed. With a cluster, they are sent to the process that works on them.
        cluster: None works in this process.
        lanes: how many items a process works on at a time.

    Raises:
        Exception: of `make` and of its function. The function must not raise for faults in a part of an item.
    """
    if cluster is not None:
        with cluster.connected() as ray:
            yield from Actors(ray, make, cluster, lanes).run(items)
        return
    work = make()

    def whole(item: Given) -> tuple[Given, Parts]:
        return item, [(item, work(item))]

    yield from map(whole, items) if lanes == 1 else in_order(whole, items, lanes, lanes + 1)


@dataclass
class _Task:
    """A task is an item, or a part of an item, and its outcome."""

    item: Any
    sent: Any = None
    """The reference of the item in Ray's object store."""
    deaths: int = 0
    result: Any = None
    done: bool = False
    parts: list[_Task] = field(default_factory=list)

    def end(self, result: Any) -> None:
        self.result, self.sent, self.done = result, None, True

    def finished(self) -> bool:
        return self.done or (bool(self.parts) and all(part.finished() for part in self.parts))

    def results(self) -> Parts:
        return [(self.item, self.result)] if self.done else [result for part in self.parts for result in part.results()]


class Actors:
    """The actors of a run work on tasks. An actor gets tasks when its process has started; a dead actor is replaced."""

    def __init__(self, ray: Any, make: Callable[[], Work[Any, Any]], cluster: Cluster, lanes: int) -> None:
        self._ray, self._lanes = ray, lanes
        self._most, needs = cluster.sized(ray)
        self._least = min(cluster.least, self._most)
        self._new = partial(ray.remote(max_concurrency=lanes, **needs)(Actor).remote, ray.put(Parcel(make)), os.getcwd())
        self._needs = ", ".join(f"{name}={number:g}" for name, number in needs.items())
        self._starting: dict[Any, Any] = {}  # reference -> actor
        self._running: dict[Any, tuple[Any, _Task]] = {}  # reference -> actor and its task
        self._actors: list[Any] = []
        self._ready: deque[_Task] = deque()  # tasks that have cost a process are in front
        self._failed_starts, self._begun, self._since, self._told = 0, False, time.monotonic(), False

    def run(self, items: Iterable[Any]) -> Iterator[tuple[Any, Parts]]:
        source, order, more = iter(items), deque[_Task](), True
        try:
            while True:
                self._take_on()
                self._hand_out()
                while order and order[0].finished():
                    task = order.popleft()
                    yield task.item, task.results()
                room = len(order) < 2 * self._lanes * self._most  # results wait for the results before them
                taking = more and room and len(self._ready) < READY
                if taking and (item := next(source, None)) is not None:
                    order.append(self._task(item))
                    self._ready.append(order[-1])
                elif taking:
                    more = False
                if not more and not order:
                    return
                self._wait(0 if taking else PATIENCE / 4)
        finally:
            for actor in (*self._actors, *self._starting.values()):
                self._ray.kill(actor)

    def _task(self, item: Any, deaths: int = 0) -> _Task:
        """Return a task whose item is sent off already: the actor that becomes free next need not wait for it."""
        return _Task(item, self._ray.put(item), deaths)

    def _hand_out(self) -> None:
        """Give the tasks that are ready to the actors that can take them, in their order."""
        for actor, idle in self._free():
            if not self._ready or (self._ready[0].deaths and not idle):
                break
            task = self._ready.popleft()
            self._running[actor.work.remote(task.sent)] = (actor, task)

    def _take_on(self) -> None:
        """Start processes up to the largest number. Processes without room wait in the cluster, which may grow."""
        while len(self._actors) + len(self._starting) < self._most:
            actor = self._new()
            self._starting[actor.start.remote()] = actor

    def _free(self) -> Iterator[tuple[Any, bool]]:
        """Yield actors that can take a task, those with fewer tasks first, and whether they are idle.

        A task that has cost a process gets an actor to itself, because its next process would die with all tasks that run beside it.
        """
        self._begun = self._begun or len(self._actors) >= self._least
        for load in range(self._lanes if self._begun else 0):
            for actor in self._actors.copy():
                tasks = [task for busy, task in self._running.values() if busy is actor]
                if len(tasks) == load and not any(task.deaths for task in tasks):
                    yield actor, not tasks

    def _wait(self, seconds: float) -> None:
        """Wait until a start or a task ends, but no longer than these seconds, and note its outcome."""
        ended, _ = self._ray.wait([*self._running, *self._starting], timeout=seconds)
        for reference in ended:
            if reference in self._starting:
                self._started(reference)
            elif reference in self._running:
                self._ended(reference)
        if self._actors:
            self._since, self._told = time.monotonic(), False
        elif not self._told and time.monotonic() - self._since > PATIENCE:
            self._told = True
            text = "no process has started in %.0f seconds: the machines are busy, or the cluster has no room for an actor with %s"
            logger.warning(text, PATIENCE, self._needs)

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # of `make`
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                raise ValueError(f"{STARTS} processes died in a row before they could work, the last: {error}") from error
        else:
            self._failed_starts = 0
            self._actors.append(actor)

    def _ended(self, reference: Any) -> None:
        actor, task = self._running.pop(reference)
        try:
            task.end(self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:  # of the work
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except self._ray.exceptions.RayError as error:  # the actor, its machine or the connection failed
            self._lost(task, error)
            if actor in self._actors:
                self._actors.remove(actor)
                self._ray.kill(actor)

    def _lost(self, task: _Task, error: Exception) -> None:
        """Have the task done again; divide it or give it up if it has cost too many processes."""
        task.deaths += 1
        halves = task.item.halves() if task.deaths >= DEATHS else []
        if halves:
            task.parts, task.sent = [self._task(half, DEATHS - 1) for half in halves], None
            self._ready.extendleft(reversed(task.parts))
        elif task.deaths <= DEATHS:
            self._ready.appendleft(task)
        else:
            reason = " ".join(str(error).split())
            task.end(GivenUp(f"every process that worked on it died, {task.deaths} in all ({reason})"))
