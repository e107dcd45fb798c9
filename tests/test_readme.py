"""The README's code blocks run, in their order, in one empty folder: later blocks use what earlier ones wrote.

Two things are not done here: `pip install` is only checked to name extras that exist (`.ci/run` installs for real), and
`python -m pytest` is not run inside itself. Recipes run with --quick, so that the main command takes about a minute.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
SECONDS = 900  # per command; a busy machine is slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    (path / "recipes").symlink_to(ROOT / "recipes")
    return path


def run(words: list[str], folder: Path) -> str:
    """The output of a command, which must succeed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_install(words: list[str]) -> None:
    assert words[:3] == ["pip", "install", "-e"]
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.fullmatch(r"\.(?:\[(.*)\])?", words[3])
    assert asked is not None and set((asked[1] or "").split(",")) <= {"", *extras}


def run_command(words: list[str], folder: Path) -> None:
    if words[0] == "pip":
        check_install(words)
    elif words == ["python", "-m", "pytest"]:
        pass
    elif words[0] == "mof":
        program = Path(sys.executable).parent / "mof"
        if not program.is_file():
            pytest.skip("the command mof is not installed: pip install -e .")
        run([str(program), *words[1:]], folder)
    else:
        assert words[0] == "python" and words[1].startswith("recipes/"), f"no rule for {shlex.join(words)}"
        quick = ["--quick"] if words[1].endswith("train_llava_mof_vig.py") and not {"--dry-run", "--dry_run"} & set(words) else []
        run([sys.executable, *words[1:], *quick], folder)


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=[f"block{i}-{block[0]}" for i, block in enumerate(BLOCKS)])
def test_block(language: str, code: str, folder: Path) -> None:
    assert language in ("python", "bash"), f"no rule for a block of {language}"
    if language == "python":
        run([sys.executable, "-c", code], folder)
        return
    for line in code.splitlines():
        for command in line.split(" && "):
            run_command(shlex.split(command, comments=True), folder)


def test_python_example_stands_in_the_first_40_lines() -> None:
    assert re.search(r"^```python\n.*?^```$", "\n".join(README.splitlines()[:40]), re.DOTALL | re.MULTILINE)
