"""The benchmark of GPUs, with tiny models on a CPU: every line has a figure, and a line that fails costs nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import launch

FOLDER = launch.ROOT / "benchmarks" / "gpu"

BAD = """
import os
from measure import Figure

def add_lines(bench):
    bench.add("good", lambda: Figure(1.0, "things/s", 5.0))
    bench.add("missing library", lambda: __import__("no_such_library"))
    bench.add("dies", lambda: os._exit(9))
    bench.add("good again", lambda: Figure(2.0, "things/s"))
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


def started(script: Path, *options: object) -> str:
    result = subprocess.run([sys.executable, script, *map(str, options)], capture_output=True, text=True, env=launch.environment())
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.slow
def test_the_models_of_full_size(benchmark: None) -> None:
    """They are built as on a GPU, on the meta device: names, sizes and the number of visual tokens are right, without a network."""
    import language_lines
    from encoder_lines import ENCODERS, built
    from measure import operations

    giga = {}
    for name, options in ENCODERS.items():
        encoder = built(options, torch.device("meta"))
        side = encoder.image_size
        giga[name] = operations(lambda e=encoder, s=side: e(torch.zeros(1, 3, s, s, dtype=torch.uint8, device="meta"))) / 2e9
        assert str(side) in name
    assert giga["CLIP ViT-L/14-336"] == pytest.approx(
        191.1 * 23 / 24, rel=0.02
    )  # multiply-adds as timm counts them, without the last block
    assert giga["SigLIP SO400M/14-384"] == pytest.approx(335.4 * 26 / 27, rel=0.03)
    for shape, billions in {"1B": 1.1, "7B": 6.74}.items():
        model = language_lines.build_model(shape, 32_000, torch.device("meta"), tiny=False)
        count = sum(parameter.numel() for parameter in model.language_model.parameters())
        assert count / 1e9 == pytest.approx(billions, rel=0.01)
        assert model.mixer.tokens_per_image == 1152 and model.dtype == torch.bfloat16
        assert len(language_lines.examples(model, 2, 3)[1]) == 3


@pytest.mark.slow
def test_every_line_has_a_figure(benchmark: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts run in this process: the next test starts them as a user does, and each start takes seconds."""
    import run

    def run_here(part: str, seconds: float, tiny: bool, scratch: Path) -> list[Any]:
        run.measure_part(part, scratch / "lines", scratch, time.monotonic() + seconds, [], tiny)
        entries = map(json.loads, (scratch / "lines").read_text().splitlines())
        return [run.read_line(entry) for entry in entries if isinstance(entry, dict)]

    monkeypatch.setattr(run, "run_part", run_here)
    options = ["--tiny", "--output", str(tmp_path), "--minutes", "60", "--scratch", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    run.main()
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
    printed = started(script, "--output", tmp_path, "--minutes", 60)
    lines = lines_of(tmp_path)
    assert lines["good"]["figure"]["value"] == 1 and lines["good again"]["figure"]["value"] == 2
    assert "no_such_library" in lines["missing library"]["missing"] and "ended with 9" in lines["dies"]["missing"]
    assert "no_such_module" in lines["all lines"]["missing"]
    assert "things/s" in printed and all(name in (tmp_path / "gpu.md").read_text() for name in lines)


def test_packages_that_are_missing_or_too_old(benchmark: None) -> None:
    """A line names them, where an import would fail obscurely in the middle of the few minutes of a GPU."""
    from requirements import refuse_missing, required, too_old

    refuse_missing(required())
    assert too_old(required()) == [] and any(requirement.startswith("transformers>=") for requirement in required())
    with pytest.raises(SystemExit, match="missing: pip install no-such-package another$"):
        refuse_missing(["torch>=2", "no-such-package>=1", "another"])
    old = too_old(["torch>=1", "transformers>=99", "no-such-package>=1"])
    assert old == [f"transformers {transformers.__version__} (needs >=99)"]


def test_budgets_of_time(benchmark: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import run

    (tmp_path / "bad_lines.py").write_text(BAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run, "PARTS", {"bad": ([("bad_lines", "add_lines")], 30.0)})
    run.measure_part("bad", tmp_path / "lines", tmp_path, end=time.monotonic(), skip=["dies"], tiny=True)
    names, *lines = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert names == ["good", "missing library", "dies", "good again"]
    assert [line["name"] for line in lines] == ["good", "missing library", "good again"]
    assert all("no time" in line["missing"] for line in lines)
    reason, stopped = run._ended([sys.executable, "-c", "import time; time.sleep(600)"], 0.1)
    assert stopped and "not finished" in reason
    reason, stopped = run._ended([sys.executable, "-c", "raise ValueError('seven')"], 600)
    assert not stopped and "ValueError: seven" in reason
