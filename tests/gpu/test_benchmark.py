"""The benchmark of GPUs, with tiny models on a CPU: every line has a figure, and a line that fails costs nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import launch

FOLDER = launch.ROOT / "benchmarks" / "gpu"

BAD = """
import os, sys, time
from measure import Figure

def add_lines(bench):
    bench.add("good", lambda: Figure(1.0, "things/s", 5.0))
    bench.add("missing library", lambda: __import__("no_such_library"))
    bench.add("dies", lambda: os._exit(9))
    bench.add("good again", lambda: Figure(2.0, "things/s"))
    bench.add("hangs", lambda: time.sleep(600))
    bench.add("after it", lambda: Figure(3.0, "things/s"))
"""
SCRIPT = """
import sys
sys.path[:0] = [{gpu!r}, {bad!r}]
import run
run.PARTS = {{"bad": ([("bad_lines", "add_lines")], 30), "unknown": ([("no_such_module", "add_lines")], 20)}}
run.main()
"""


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in json.loads((folder / "gpu.json").read_text())["lines"]}


def run(script: Path, *options: object) -> str:
    result = subprocess.run([sys.executable, script, *map(str, options)], capture_output=True, text=True, env=launch.environment())
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
def test_every_line_has_a_figure(tmp_path: Path) -> None:
    run(FOLDER / "run.py", "--tiny", "--output", tmp_path, "--minutes", 15, "--scratch", tmp_path)
    facts, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    for line in facts["lines"]:
        assert line["figure"] is not None, line
        assert line["figure"]["value"] > 0 and line["memory"] is not None and line["name"] in text
        assert (line["share"] is not None) == (line["figure"]["rate"] is not None)
    assert {line["part"] for line in facts["lines"]} == {"encoders", "pairs", "scoring", "training", "generation", "files", "compiled"}
    assert facts["about"]["torch"] and facts["about"]["transformers"] and "tiny" in facts["about"]
    assert list(tmp_path.iterdir()) and not list(tmp_path.glob("tmp*")), "the files to read are deleted"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_line_that_fails_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "bad_lines.py").write_text(BAD)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(gpu=str(FOLDER), bad=str(tmp_path)))
    printed = run(script, "--output", tmp_path, "--minutes", 1)
    lines = lines_of(tmp_path)
    assert lines["good"]["figure"]["value"] == 1 and lines["good again"]["figure"]["value"] == 2
    assert "no_such_library" in lines["missing library"]["missing"] and "ended with 9" in lines["dies"]["missing"]
    assert "not finished" in lines["hangs"]["missing"] and "no time" in lines["after it"]["missing"]
    assert "no_such_module" in lines["all lines"]["missing"]
    assert "things/s" in printed and all(name in (tmp_path / "gpu.md").read_text() for name in lines)
