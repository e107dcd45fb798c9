"""A run shows a progress bar to its user, and reports at the end how many images were encoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class EncodeReport:
    """The numbers of images that a run has seen and encoded."""

    images: int
    """Different contents that were seen and can be read."""
    encoded: int
    """The images among them that an encoder ran on; the rest was in the store."""
    duplicates: int
    """Further names of contents that were seen in this run."""
    unreadable: int
    """Names listed in `failures.jsonl` in the store; also a tar that is cut off counts as one."""
    bytes: int
    """Size of the whole store on disk."""
    int8_error: dict[str, dict[str, float]]
    """Per encoder with int8 tokens, over the whole store: "mean" and "max" of |stored - token| / |token|."""

    def summary(self) -> str:
        """Return the numbers in one line."""
        parts = [f"{self.images:,} images ({self.encoded:,} encoded now)", f"{self.duplicates:,} duplicates"]
        parts += [f"{self.unreadable:,} unreadable", f"{self.bytes / 2**20:,.1f} MiB on disk"]
        parts += [f"int8 error of {name} {e['mean']:.2%} (at most {e['max']:.2%})" for name, e in self.int8_error.items()]
        return ", ".join(parts)


@contextmanager
def progress_bar(total: int | None, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar. Yield the function that advances it to (images done, unreadable images so far)."""
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[bad]}"),
    )
    with Progress(*columns, disable=not shown) as bar:
        task, start = bar.add_task("images", total=total, rate="", bad=""), time.monotonic()

        def advance(done: int, unreadable: int) -> None:
            rate = done / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done, rate=f"{rate:.1f} images/s", bad=f"{unreadable} unreadable" if unreadable else "")

        yield advance
