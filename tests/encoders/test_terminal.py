"""Names and answers reach a terminal without control characters, whatever prints them."""

from __future__ import annotations

import ast
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from rich.table import Table

from encoders.console import Console
from encoders.terminal import PlainFormatter, plain, say

ROOT = Path(__file__).parents[2]
EVIL = "\x1b]0;owned\x07 \x1b[2J \x9b31m \r \u202egnp.exe \udcff \x7f"


@given(st.text())
def test_plain_text_holds_no_orders_and_stays_as_it_is_without_them(text: str) -> None:
    shown = plain(text)
    assert all(character.isprintable() or character.isspace() or ord(character) > 0x9F for character in shown)
    assert plain(shown) == shown
    shown.encode()


def test_every_way_to_print_writes_orders_out(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    say(EVIL, err=True)
    logged = PlainFormatter("%(levelname)s: %(message)s").format(logging.makeLogRecord({"msg": EVIL, "levelname": "WARNING"}))
    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=True)
    table = Table(EVIL)
    table.add_row(EVIL)
    console.print(EVIL, table, style="bold red")
    with Progress(console=console) as bar:
        bar.add_task(EVIL.replace("[", ""), total=2)
    out = capsys.readouterr()
    for text in (out.out, out.err, logged, file.getvalue()):
        assert "owned" in text and "\x1b]0" not in text and "\x1b[2J " not in text and not {"\x07", "\x9b", "\u202e", "\x7f"} & {*text}
    assert "\x1b[1;31m" in file.getvalue()  # rich's own colours stay


def test_what_looks_like_markup_is_printed() -> None:
    file, text = io.StringIO(), "[red] [/INST] :smile: שלום 中文 👩‍👧 é"
    table = Table(text)
    table.add_row(text)
    Console(file=file, width=200).print(text, table)
    assert file.getvalue().count(text) == 3


def test_a_command_that_refuses_a_name_writes_its_orders_out(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from mof.cli.app import main; main()", "verify", tmp_path / EVIL[:12]], capture_output=True
    )
    assert done.returncode == 2 and b"\\x1b]0;owned" in done.stderr and b"\x1b" not in done.stderr


def test_nothing_else_prints() -> None:
    """`typer.echo`, and rich's own console, would let the orders through."""
    for path in (path for package in ("encoders", "mof", "vig") for path in (ROOT / package).rglob("*.py")):
        if path.name in ("terminal.py", "console.py"):
            continue
        tree = ast.parse(path.read_text())
        assert "typer.echo" not in {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}, path
        imported = {(node.module, name.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
        assert ("rich.console", "Console") not in imported or path.name == "text_tables.py", path
