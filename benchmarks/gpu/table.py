"""The table of all lines on the screen, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hardware import COPY, PRODUCT, published
from measure import Line
from requirements import required, too_old
from rich.console import Console
from rich.table import Table

from encoders.runs import versions
from encoders.whole_files import write_text

INTRODUCTION = """# Speed and memory on a GPU

`python benchmarks/gpu/run.py` measured this table; its `--help` says how. All weights are random and all data is drawn. The share is of the
peak that stands below.

"""
COLUMNS = ("part", "line", "result", "share of peak", "peak memory", "note")


def write_tables(lines: Sequence[Line], folder: Path, seconds: float, tiny: bool) -> None:
    """Print the table, and write it as gpu.md and gpu.json."""
    about, peaks = _about(seconds, tiny), _peaks(lines)
    rows = [_row(line, peaks) for line in lines]
    table = Table(*COLUMNS, title=f"{about['device']}, torch {about['torch']}")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    facts = "".join(f"- {name}: {value}\n" for name, value in about.items())
    sources = "".join(f"- peak of {name}: {value / 1e12:,.4g}e12 per second, {source}\n" for name, (value, source) in peaks.items())
    cells = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    body = "".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |\n" for row in cells)
    write_text(folder / "gpu.md", f"{INTRODUCTION}{facts}{sources}\n{body}")
    entries = [{**asdict(line), "share": _share(line, peaks)} for line in lines]
    write_text(folder / "gpu.json", json.dumps({"about": about, "peaks": peaks, "lines": entries}, indent=1) + "\n")


def _about(seconds: float, tiny: bool) -> dict[str, Any]:
    known = torch.cuda.is_available()
    about: dict[str, Any] = {"device": torch.cuda.get_device_name() if known else platform.processor() or platform.machine()}
    if known:
        about |= {"memory": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB", "CUDA": torch.version.cuda}
    about |= {
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        **versions("torch", "transformers", "timm", "open_clip_torch", "mof-vig"),
    }
    about |= {"older than needed": ", ".join(old)} if (old := too_old(required())) else {}
    return about | {"seconds": round(seconds)} | ({"tiny": "tiny models and little data: the numbers mean nothing"} if tiny else {})


def _peaks(lines: Sequence[Line]) -> dict[str, tuple[float, str]]:
    """Return the peaks that rates are shares of, with their source."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if known := published(name):
        return {kind: (value, "as published") for kind, value in known.items()}
    measured = {"bf16": PRODUCT, "bandwidth": COPY}
    rates = {line.name: line.figure.rate for line in lines if line.figure is not None}
    return {kind: (rate, "as measured here") for kind, line in measured.items() if (rate := rates.get(line))}


def _share(line: Line, peaks: dict[str, tuple[float, str]]) -> float | None:
    figure = line.figure
    return figure.rate / peaks[figure.of][0] if figure is not None and figure.rate and figure.of in peaks else None


def _row(line: Line, peaks: dict[str, tuple[float, str]]) -> tuple[str, ...]:
    if line.figure is None:
        return line.part, line.name, "-", "-", "-", f"not measured: {line.missing}"
    share = _share(line, peaks)
    result = f"{line.figure.value:,.4g} {line.figure.unit}"
    memory = "-" if line.memory is None else f"{line.memory:.1f} GB"
    return line.part, line.name, result, "-" if share is None else f"{share:.1%}", memory, line.figure.note
