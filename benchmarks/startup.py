"""Measure the time in which the command line starts, beside `import torch` in the same environment.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

MOF = "import sys; from mof.cli.app import main; sys.argv[0] = 'mof'; main()"
PROGRAMS = {
    "import torch": ["-c", "import torch"],
    "mof --help": ["-c", MOF, "--help"],
    "mof encode --list": ["-c", MOF, "encode", "--list"],
    "mof vig --help": ["-c", MOF, "vig", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Return the wall time of a new Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print the fastest run of each program, after a first run that fills the caches of the disk, and its ratio to `import torch`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="Runs of each program.")
    repeats = parser.parse_args().repeats
    for arguments in PROGRAMS.values():
        seconds(arguments)
    times = {name: min(seconds(arguments) for _ in range(repeats)) for name, arguments in PROGRAMS.items()}
    for name, taken in times.items():
        print(f"{name:20} {taken:6.2f} s {taken / times['import torch']:6.2f} x import torch")


if __name__ == "__main__":
    main()
