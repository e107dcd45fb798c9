"""progress_bar shows the progress of a run: by a bar in a terminal or a notebook, by a line every minute in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from encoders.console import Console

SECONDS, NOTEBOOK_SECONDS = 60.0, 5.0
"""Time between two lines if no bar can be shown: in a log, and in a notebook without ipywidgets."""

Advance = Callable[[int, str], None]
T = TypeVar("T")


@contextmanager
def progress_bar(units: str, total: int | None, shown: bool = True) -> Iterator[Advance]:
    """Show the progress of a run on stderr. Yield the function that takes the number of units done so far, and a note.

    Args:
        units: the name of the things that are counted, for example "images".
        total: the number of these things, or None if it is unknown.
        shown: False shows nothing.
    """
    console, start = Console(stderr=True), time.monotonic()
    bar_is_possible = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    between, last = NOTEBOOK_SECONDS if console.is_jupyter else SECONDS, start
    texts = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (texts[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), texts[1])
    with Progress(*columns, console=console, disable=not (shown and bar_is_possible)) as bar:
        task = bar.add_task(units, total=total, note="")

        def advance(done: int, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            rate = done / max(now - start, 1e-9)
            note = f"{rate:,.1f} {units}/s{note and ', '}{note}"
            bar.update(task, completed=done, note=note)
            if shown and not bar_is_possible and now - last >= between:
                last = now
                of_total = "" if total is None else f" of {total:,}"
                left = "" if total is None or not done else f", {(total - done) / rate / 60:.0f} minutes left"
                console.print(f"{done:,}{of_total} {units}, {note}{left}", markup=False, highlight=False, soft_wrap=True)

        yield advance


def tracked(things: Iterable[T], units: str, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """Yield the things, and show the number of finished things with `progress_bar`. The total is their length if they have one."""
    with progress_bar(units, len(things) if isinstance(things, Sized) else total, shown) as advance:
        for done, thing in enumerate(things, 1):
            yield thing
            advance(done, "")
