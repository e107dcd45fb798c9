"""The README's code blocks run, in their order, in one empty folder: later blocks use what earlier ones wrote.

Two things are not done here: `pip install` is only checked to name extras that exist (`.ci/run` installs for real), and
`python -m pytest` is not run inside itself. Everything runs in the test's process, since starting Python takes most of the time
of most commands. The main recipe runs with --quick and only its last row, which goes through all stages (`.ci/run` runs all rows).
"""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from encoders import registry
from mof.cli.app import build_app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
APP = build_app({"train": "vig.cli.train:train", "vig": "vig.cli.app:app"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    (path / "recipes").symlink_to(ROOT / "recipes")
    return path


def check_install(words: list[str]) -> None:
    assert words[:3] == ["pip", "install", "-e"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.fullmatch(r"\.(?:\[(.*)\])?", words[3])
    assert asked is not None and set((asked[1] or "").split(",")) <= {"", *extras}


def run_command(words: list[str], patch: pytest.MonkeyPatch) -> None:
    if words[0] == "pip":
        check_install(words)
    elif words[0] == "mof":
        result = CliRunner().invoke(APP, words[1:])
        assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
    elif words[:3] != ["python", "-m", "pytest"]:
        assert words[0] == "python" and words[1].startswith("recipes/"), f"no rule for {shlex.join(words)}"
        quick = words[1].endswith("train_llava_mof_vig.py") and "--dry-run" not in words
        patch.setattr("sys.argv", [*words[1:], *(["--quick", "--rows", "interleaved+vig"] if quick else [])])
        importlib.import_module(Path(words[1]).stem).main()


@pytest.mark.slow
@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=[f"block{i}-{block[0]}" for i, block in enumerate(BLOCKS)])
def test_block(language: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert language in ("python", "bash"), f"no rule for a block of {language}"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))  # an example registers an encoder
    if language == "python":
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
        return
    for line in code.splitlines():
        for command in line.split(" && "):
            run_command(shlex.split(command, comments=True), monkeypatch)


def test_python_example_stands_in_the_first_40_lines() -> None:
    assert re.search(r"^```python\n.*?^```$", "\n".join(README.splitlines()[:40]), re.DOTALL | re.MULTILINE)
