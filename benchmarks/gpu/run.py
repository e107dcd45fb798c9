"""Measure this library on a GPU in at most eight minutes. Print a table with the share of the hardware's peak for each line.

    python benchmarks/gpu/run.py                          # writes gpu.md and gpu.json into the current folder
    python benchmarks/gpu/run.py --output FOLDER --minutes 4 --parts encoders pairs
    python benchmarks/gpu/run.py --tiny                   # all of it with tiny models, also on a CPU; its numbers mean nothing

All weights are random and all data is drawn, so that no network is needed. Each part runs in a process of its own with a budget of
time. A line that fails (out of memory, a missing library) or does not fit into the budget says so in the table and costs nothing else.
The share is of the published peak of the device: of dense bfloat16 products, or of the memory's bandwidth for lines in which weights
are read again and again. For a device that is not in `hardware.PEAKS`, it is a share of the product and the copy that were measured
first. The operations are counted by torch in a run of the line, so that operations which a faster way saves count for neither.
Blind pairs count as the product of CLIP's embeddings in full that a brute-force search would make, so their share may exceed 100 %.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from measure import Bench, Line, is_sticky, read_line, write_line
from requirements import refuse_missing, required, too_old
from table import write_tables

PARTS: dict[str, tuple[list[tuple[str, str]], float]] = {  # part -> functions that enter its lines, and its budget in seconds
    "encoders": ([("hardware", "add_lines"), ("encoder_lines", "add_pixel_lines")], 55),
    "pairs": ([("pair_lines", "add_lines")], 75),
    "scoring": ([("language_lines", "add_scoring_lines")], 75),
    "training": ([("language_lines", "add_training_lines")], 70),
    "generation": ([("language_lines", "add_generation_lines")], 40),
    "files": ([("encoder_lines", "add_file_lines")], 60),
    "compiled": ([("encoder_lines", "add_compiled_lines")], 95),
}
RESERVE = 8.0
"""Seconds at the end for the tables."""


def measure_part(part: str, lines: Path, scratch: Path, end: float, skip: Sequence[str], tiny: bool) -> None:
    """Measure the lines of a part in this process until `end` (`time.monotonic`), and write each into the file `lines` at once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, tiny, end, scratch)
    for module, function in PARTS[part][0]:
        getattr(import_module(module), function)(bench)
    write_line(lines, list(bench.lines))
    for name in bench.lines:
        if name in skip:
            continue
        if bench.left < 2:
            write_line(lines, Line(part, name, missing="no time was left in the budget of its part"))
            continue
        write_line(lines, name)
        line = bench.measured(part, name)
        write_line(lines, line)
        if is_sticky(line):  # the rest needs a new process
            return


def run_part(part: str, seconds: float, tiny: bool, scratch: Path) -> list[Line]:
    """Measure the lines of a part in other processes. A process that dies costs the line that it measured."""
    end, done, names, reason = time.monotonic() + seconds, dict[str, Line](), list[str](), ""
    while True:
        before, left = len(done), end - time.monotonic()
        file = scratch / f"lines-{before}.jsonl"
        options = ["--part", part, "--lines", str(file), "--end", f"{end:.1f}", "--scratch", str(scratch), "--skip", json.dumps(list(done))]
        reason, timed_out = _ended([sys.executable, sys.argv[0], *options, *(["--tiny"] if tiny else [])], left + 3)
        begun = ""
        written = file.read_text() if file.exists() else ""
        for entry in map(json.loads, written[: written.rfind("\n") + 1].splitlines()):  # the last may be cut
            if isinstance(entry, list):
                names = entry
            elif isinstance(entry, str):
                begun = entry
            else:
                line = read_line(entry)
                done[line.name] = line
        if begun and begun not in done:
            done[begun] = Line(part, begun, missing=reason)
        if timed_out or len(done) == before or all(name in done for name in names):
            break
    names = names or ["all lines"]
    return [done.get(name, Line(part, name, missing="no time was left" if timed_out and done else reason)) for name in names]


def _ended(command: list[str], seconds: float) -> tuple[str, bool]:
    """Run a command for so many seconds at most. Return how it ended, in words, and whether it was stopped."""
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"not finished when the {seconds:.0f} s of its part were over", True
        finally:
            if os.name == "posix" and child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with the compilers that it started
            child.wait()
        said.seek(0)
        last = said.read().decode(errors="replace").strip().splitlines()[-1:] or [""]
    return f"the process ended with {child.returncode}: {last[0][:200]}", False


def measure_parts(parts: Sequence[str], seconds: float, tiny: bool, scratch: Path | None) -> list[Line]:
    """Return the lines of all parts. Seconds that a part does not need go to the parts after it."""
    end, lines = time.monotonic() + seconds - RESERVE, list[Line]()
    scale = (seconds - RESERVE) / sum(budget for _, budget in PARTS.values())
    for place, part in enumerate(parts):
        later = sum(PARTS[other][1] for other in parts[place + 1 :]) * scale
        with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
            measured = run_part(part, end - time.monotonic() - later, tiny, Path(folder))
        for line in measured:
            figure = f"{line.figure.value:,.4g} {line.figure.unit}" if line.figure else line.missing
            print(f"{line.part}: {line.name}: {figure} ({line.seconds:.0f} s)", file=sys.stderr, flush=True)
        lines += measured
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of gpu.md and gpu.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="the budgets of the parts are scaled to this time")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scratch", type=Path, help="folder on the disk to read from; by default the system's folder for temporary files")
    parser.add_argument("--tiny", action="store_true", help="tiny models and little data, to see that everything works")
    for name in ("part", "lines", "end", "skip"):  # of a part's own process
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        measure_part(args.part, Path(args.lines), args.scratch, float(args.end), json.loads(args.skip), args.tiny)
        return
    refuse_missing(required())
    if old := too_old(required()):
        print(f"older than this library needs, so lines may fail: {', '.join(old)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    lines = measure_parts(args.parts, 60 * args.minutes, args.tiny, args.scratch)
    args.output.mkdir(parents=True, exist_ok=True)
    write_tables(lines, args.output, time.monotonic() - start, args.tiny)


if __name__ == "__main__":
    main()
