"""Time, work and memory of a measurement on any device. A line of the benchmark costs only itself when it fails."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

sys.path += [str(folder) for folder in Path(__file__).resolve().parents[1:3]]  # benchmarks/memory.py, and this library if not installed

from memory import peak, resident
from torch.utils.flop_counter import FlopCounterMode

STICKY = ("CUDA error", "device-side assert", "an illegal memory access")
"""Words of errors after which a process can no longer use its GPU."""


class TooSlow(Exception):
    """TooSlow says that a line would not end within its part's budget."""


@dataclass
class Figure:
    """A figure is the outcome of a measurement."""

    value: float
    unit: str
    rate: float | None = None
    """Floating point operations per second, or bytes per second with `of` "bandwidth"."""
    of: str = "bf16"
    """The peak that the rate is a share of: "bf16" or "bandwidth"."""
    note: str = ""


@dataclass
class Line:
    """A line of the table: a figure, or the reason why there is none."""

    part: str
    name: str
    figure: Figure | None = None
    memory: float | None = None
    """Peak memory in GB: of the device, or on a CPU what the process takes beyond its memory before the line."""
    seconds: float = 0.0
    missing: str = ""


@dataclass
class Bench:
    """A bench holds the conditions of a part's lines.

    Args:
        tiny: whether models and data are so small that a CPU needs seconds.
        end: when the part's budget ends (`time.monotonic`).
        scratch: a folder for files, which is deleted afterwards.
    """

    device: torch.device
    tiny: bool
    end: float
    scratch: Path
    lines: dict[str, Callable[[], Figure]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.end - time.monotonic()

    def add(self, name: str, measure: Callable[[], Figure]) -> None:
        """Enter a line. It is measured later, so that all names are known before the first measurement."""
        self.lines[name] = measure

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], *, most: float = 2.0) -> float:
        """Return the shortest time of a run. There are up to 20 runs in about `most` seconds, after a run that is not timed.

        Raises:
            TooSlow: where even two runs would not fit into the budget.
        """
        first = self._once(run)
        if first > self.left:
            raise TooSlow(f"a run takes {first:.1f} s, and {max(self.left, 0):.0f} s are left of the budget")
        times, most = [self._once(run)], 0.0 if self.tiny else most
        while len(times) < 20 and sum(times) < min(most, self.left / 2):
            times.append(self._once(run))
        return min(times)

    def _once(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def measured(self, part: str, name: str) -> Line:
        """Measure a line. Any error becomes the reason why it has no figure; errors that spoil the process are raised afterwards."""
        line, start = Line(part, name), time.monotonic()
        before = self._clean()
        try:
            line.figure = self.lines[name]()
            self.wait()
            line.memory = self._peak(before)
        except Exception as error:  # out of memory, a missing library, a failed compilation: any kind
            line.missing = _reason(error)
        line.seconds = time.monotonic() - start
        return line

    def _clean(self) -> float:
        gc.collect()
        if self.device.type != "cuda":
            return resident() if sys.platform == "linux" else 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return 0.0

    def _peak(self, before: float) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return peak() - before if sys.platform == "linux" else None


def operations(run: Callable[[], object]) -> float:
    """Return the floating point operations of the matrix products and convolutions that a run makes, forward and backward."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know this kernel
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return float(counter.get_total_flops())


def write_line(path: Path, entry: Line | list[str] | str) -> None:
    """Append an entry to the file that the parent process reads: the names of all lines, the name of a line that begins, or a line."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(entry) if isinstance(entry, Line) else entry) + "\n")


def read_line(entry: dict) -> Line:
    """Return the line that `write_line` wrote."""
    figure = entry.pop("figure")
    return Line(**entry, figure=None if figure is None else Figure(**figure))


def _reason(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return (text if isinstance(error, TooSlow) else f"{type(error).__name__}: {text}")[:200]


def is_sticky(line: Line) -> bool:
    """Return whether the process can measure no further line."""
    return any(words in line.missing for words in STICKY)
