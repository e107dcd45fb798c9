"""The progress bar of a scoring run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vig.scoring.scores import Score


@contextmanager
def scoring_bar(total: int | None, visible: bool = True) -> Iterator[Callable[[int, Sequence[Score]], None]]:
    """A bar with records per second, time left and the running mean VIG; silent when the output is not a terminal."""
    console = Console(stderr=True)
    facts = TextColumn("{task.fields[rate]:.1f} records/s, mean VIG {task.fields[vig]:.3f}")
    columns = (TextColumn("VIG"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), facts)
    with Progress(*columns, console=console, disable=not (visible and console.is_terminal)) as progress:
        task = progress.add_task("", total=total, rate=0.0, vig=float("nan"))
        start = time.perf_counter()
        count, sum_of_vig = 0, 0.0

        def advance(records: int, scores: Sequence[Score]) -> None:
            nonlocal count, sum_of_vig
            count, sum_of_vig = count + len(scores), sum_of_vig + sum(score.vig for score in scores)
            progress.advance(task, records)
            rate = progress.tasks[task].completed / (time.perf_counter() - start)
            progress.update(task, rate=rate, vig=sum_of_vig / max(count, 1))

        yield advance
