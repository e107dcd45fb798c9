"""progress_bar shows the progress of a run: by a bar in a terminal or a notebook, by a line every minute in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from html import escape
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from encoders.console import Console

SECONDS, NOTEBOOK_SECONDS = 60.0, 1.0
"""Time between two lines in a log, and between two states of a notebook's bar."""

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
    between, last = NOTEBOOK_SECONDS if console.is_jupyter else SECONDS, start
    in_notebook = _NotebookBar(total)
    texts = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[note]}", markup=False)
    columns = (texts[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), texts[1])
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(units, total=total, note="")

        def advance(done: int, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            rate = done / max(now - start, 1e-9)
            note = f"{rate:,.1f} {units}/s{note and ', '}{note}"
            bar.update(task, completed=done, note=note)
            if shown and not console.is_terminal and (now - last >= between or (in_notebook.begun and done == total)):
                last = now
                of_total = "" if total is None else f" of {total:,}"
                left = "" if total is None or not done else f", {(total - done) / rate / 60:.0f} minutes left"
                line = f"{done:,}{of_total} {units}, {note}{left}"
                if console.is_jupyter:
                    in_notebook.show(done, line)
                else:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield advance


class _NotebookBar:
    """_NotebookBar draws a bar below a notebook's cell again and again in the same place, so that it needs no widgets.

    Args:
        total: the number of things at the end of the bar; None draws no bar beside the text.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._display: Any = None

    @property
    def begun(self) -> bool:
        """Return whether the bar was drawn."""
        return self._display is not None

    def show(self, done: int, text: str) -> None:
        """Draw the bar up to `done`, with a text beside it."""
        from IPython.display import display  # only notebooks have it

        bar = "" if self._total is None else f'<progress value="{done}" max="{self._total}"></progress> '
        shown: Any = {"text/plain": text, "text/html": bar + escape(text)}
        if self._display is None:
            self._display = display(shown, raw=True, display_id=True)
        else:
            self._display.update(shown, raw=True)


def tracked(things: Iterable[T], units: str, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """Yield the things, and show the number of finished things with `progress_bar`. The total is their length if they have one."""
    with progress_bar(units, len(things) if isinstance(things, Sized) else total, shown) as advance:
        for done, thing in enumerate(things, 1):
            yield thing
            advance(done, "")
