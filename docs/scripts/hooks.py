"""Hooks of mkdocs: they write the page of the commands from the commands themselves, and add the pages that others put into docs/."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from mof.cli.app import build_app

COMMANDS = "reference/commands.md"
HEAD = """# Commands

This page is written from the help texts when the site is built: `mof COMMAND --help` prints the same.

Exit codes: 0 for success, 1 for a bug or a damaged file, 2 for refused input, 130 for Ctrl-C. Errors of input are one line, and `mof
--debug` shows the traceback. A command that was stopped goes on when it is called again.
"""
OPTION = re.compile(r"(?<![\w`-])--[a-z][a-z-]*[a-z](?: [A-Z]{2,})?|\b[A-Z]+(?:_[A-Z]+)+(?:=\w+)?")
WORD = re.compile(r"<code>([^<\s]{1,28}|--[^<]{1,26})</code>")
RESULTS_FIRST = ("index.md", "noise.md", "clean-data.md", "photos.md")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation with the pages that lie in docs/results, docs/examples and docs."""
    docs = Path(config.docs_dir)
    results = sorted(path.name for path in (docs / "results").glob("*.md"))
    ordered = [name for name in RESULTS_FIRST if name in results] + [name for name in results if name not in RESULTS_FIRST]
    further = [name for name in ("scale.md",) if (docs / name).is_file()]
    examples = sorted(f"examples/{path.name}" for path in (docs / "examples").glob("*.md"))
    nav: list[Any] = []
    for entry in config.nav or []:
        nav.append({"Results": [f"results/{name}" for name in ordered]} if entry == {"Results": []} else entry)
        if isinstance(entry, dict) and "Explanations" in entry:
            nav += further
        if isinstance(entry, dict) and "How to" in entry and examples:
            nav.append({"Examples": examples})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the commands."""
    files.append(File.generated(config, COMMANDS, content=commands_page()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Return a page whose lines do not break inside options or before "%". Code blocks stay as they are."""
    parts = re.split(r"(<pre.*?</pre>)", html, flags=re.DOTALL)
    return "".join(part if part.startswith("<pre") else _unbroken(part) for part in parts)


def _unbroken(html: str) -> str:
    return WORD.sub(r'<code class="word">\1</code>', re.sub(r"(?<=\d) %", "&nbsp;%", html))


def commands_page() -> str:
    """Return the page: for each command its description, its example and its options."""
    root = typer.main.get_command(build_app({"train": "vig.cli.train:train", "vig": "vig.cli.app:app"}))
    return HEAD + "".join(_section(words, command) for words, command in _commands(["mof"], root) if len(words) > 1)


def _commands(words: list[str], command: Any) -> Iterator[tuple[list[str], Any]]:
    """Yield every command below a command, with the words that call it."""
    yield words, command
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            yield from _commands([*words, name], command.get_command(None, name))


def _section(words: list[str], command: Any) -> str:
    """Return the section of a command. A group without options of its own has no table."""
    name = " ".join(words)
    records = [parameter.get_help_record(command.context_class(command, info_name=name)) for parameter in command.params]
    rows = [(option, meaning) for option, meaning in filter(None, records) if option != "--help"]
    table = "".join(f"| `{_cell(option)}` | {_prose(_cell(meaning))} |\n" for option, meaning in rows)
    text = _markdown((command.help or "").replace("\b\n", ""))
    return f"\n## {name}\n\n{text}\n" + (f"\n| option | meaning |\n| --- | --- |\n{table}" if table else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _prose(text: str) -> str:
    """Return text with the names of options and variables as code."""
    return OPTION.sub(r"`\g<0>`", text).replace("<", "&lt;")


def _markdown(text: str) -> str:
    """Return a help text as Markdown, with indented commands in fences."""
    parts = re.split(r"((?:^ {2,}\S.*\n?)+)", text, flags=re.MULTILINE)
    return "".join(_fence(part) if part.startswith("  ") else _prose(part) for part in parts)


def _fence(commands: str) -> str:
    return f"\n```bash\n{textwrap.dedent(commands).rstrip()}\n```\n"
