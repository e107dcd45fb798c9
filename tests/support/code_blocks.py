"""The code blocks of Markdown pages: `run` runs them, `check` checks blocks that cannot run in a test.

A comment before a block says that it is only checked, and why: `<!-- only checked: needs eight GPUs -->`. Then its options, arguments,
imports and files must exist. Blocks of `docs/results/` are commands of studies and measurements, and are always only checked. Three things are never done: `pip install` only has to name extras that exist (`.ci/run` installs for real),
`python -m pytest` is not run inside itself, and recipes do less: the main recipe runs with --quick and only its last row, which goes through
all stages (`.ci/run` runs all rows), and few benchmarks are drawn. Everything runs in the test's process, since starting Python takes most of the time of most commands.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperCommand

from encoders import registry
from support.commands import mof

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^(?:<!-- only checked: ([^\n]+) -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LAUNCHERS = re.compile(r"torchrun --no-python --nproc_per_node \d+ |accelerate launch --config_file (\S+) ")
SCRIPTS = ("recipes/", "benchmarks/", "docs/scripts/", "examples/")
LESS = {"train_llava_mof_vig.py": ["--quick", "--rows", "interleaved+vig"], "draw_benchmarks.py": ["--pairs", "2", "--scenes", "10"]}
"""Recipe -> options with which it runs in a test."""
TOOLS = (["python", "-m", "pytest"], ["python", "-m", "build"], ["twine"], ["mkdocs"], ["pre-commit"], ["rm", "-rf", "dist"])


@dataclass(frozen=True)
class Block:
    """A block of code with the reason why it is only checked, or "" if it runs."""

    name: str
    reason: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = page.read_text()
    fences = len(re.findall(r"^```", text, re.MULTILINE))
    default = "a study" if page.parent.name == "results" else ""
    found = [Block(f"{page.name}, block {n}", *match.groups(default)) for n, match in enumerate(BLOCK.finditer(text))]
    assert fences == 2 * len(found), f"{page.name}: a block without a language, or not at the beginning of a line"
    return found


def run(block: Block, names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """Run a block in the current folder, or check it if it is only checked. `names` are the variables of the page's Python."""
    with patch.context() as inner:
        inner.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))  # an example may register an encoder
        if block.language in ("json", "toml"):
            (json.loads if block.language == "json" else tomllib.loads)(block.code)
        elif block.language == "python":
            _check_python(block) if block.reason else exec(compile(block.code, block.name, "exec"), names)
        else:
            assert block.language == "bash", f"{block.name}: no rule for a block of {block.language}"
            for command in _commands(block.code):
                _run_command(command, bool(block.reason), inner)


def _commands(code: str) -> Iterator[str]:
    for line in code.replace("\\\n", " ").splitlines():
        yield from line.split(" && ")


def _check_python(block: Block) -> None:
    """Run the imports, and compare the keywords of the calls of imported names with their signatures."""
    tree, names = ast.parse(block.code), dict[str, Any]()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), block.name, "exec"), names)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        head, *rest = ast.unparse(call.func).split(".")
        if head in names and all(part.isidentifier() for part in rest):
            called = reduce(getattr, rest, names[head])
            if not inspect.isbuiltin(called):  # they have no signature
                inspect.signature(called).bind_partial(*call.args, **{keyword.arg or "": None for keyword in call.keywords})


def _run_command(command: str, only_check: bool, patch: pytest.MonkeyPatch) -> None:
    if launcher := LAUNCHERS.match(command):
        assert only_check and (launcher[1] is None or (ROOT / launcher[1]).is_file()), command
        command = command[launcher.end() :]
    words = shlex.split(command, comments=True)
    if (words[0] == "python" and words[1].startswith(SCRIPTS)) or words[0].startswith(SCRIPTS):
        _run_script(words[words[0] == "python" :], only_check, patch)
    elif words[0] == "mof":
        _run_mof(words, only_check, patch)
    elif words[0] == "pip":
        _check_install(words)
    else:
        assert any(words[: len(tool)] == tool for tool in TOOLS), f"no rule for {command}"


def _run_mof(words: list[str], only_check: bool, patch: pytest.MonkeyPatch) -> None:
    with patch.context() as inner:
        if only_check:
            inner.setattr(TyperCommand.__base__, "invoke", lambda command, context: None)  # the words were parsed before
        result = mof(*words[1:])
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"


def _run_script(words: list[str], only_check: bool, patch: pytest.MonkeyPatch) -> None:
    for word in words:
        assert not word.startswith(SCRIPTS) or (ROOT / word).is_file(), f"{word} is missing"
    if only_check:
        return
    assert words[0].startswith("recipes/"), f"only recipes run in a test: {words[0]}"
    less = [] if "--dry-run" in words else LESS.get(Path(words[0]).name, [])
    patch.setattr("sys.argv", [*words, *less])
    importlib.import_module(Path(words[0]).stem).main()


def _check_install(words: list[str]) -> None:
    assert words[:3] == ["pip", "install", "-e"], words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.fullmatch(r"\.(?:\[(.*)\])?", words[3])
    assert asked is not None and set((asked[1] or "").split(",")) <= {"", *extras}, words
