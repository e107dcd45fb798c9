"""The command `mof` with all its commands, called in the test's process."""

from __future__ import annotations

import typer
from typer.testing import CliRunner, Result

from mof.cli.app import build_app

APP = build_app({"train": "vig.cli.train:train", "vig": "vig.cli.app:app"})


def mof(*words: object, app: typer.Typer = APP, typed: str | None = None, **environment: str) -> Result:
    """Call the command with these words and variables of the environment; `typed` is what the user types."""
    return CliRunner().invoke(app, [str(word) for word in words], input=typed, env=environment)


def refused(result: Result, *words: str) -> None:
    """Check that the exit code is 2 and that the last line of standard error, after bars, is the message and says all the words."""
    assert result.exit_code == 2 and "Traceback" not in result.stderr, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mof: ") and all(word in last for word in words), last
