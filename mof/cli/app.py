"""This is the command `mof`. Its commands are imported when they are called. Packages add commands by entry points `mof.commands`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated

import typer

from encoders.command_groups import Target, command_group
from encoders.terminal import log_to_terminal, say

COMMANDS: dict[str, Target] = {
    "encode": "mof.cli.encode:encode",
    "convert": "mof.cli.convert:convert",
    "chat": "mof.cli.chat:chat",
    "demo": "mof.cli.demo:demo",
    "serve": "mof.cli.serve:serve",
    "blind-pairs": "mof.cli.blind_pairs:pairs_app",
    "probe": "mof.cli.probe:probe",
    "eval": "mof.cli.eval:evaluate",
    "verify": "mof.cli.verify:verify",
}


def build_app(commands: Mapping[str, Target]) -> typer.Typer:
    """Return the command `mof` with its own commands and the commands of other packages, by name."""
    return command_group({**COMMANDS, **commands}, callback=_mof, name="mof")


def main() -> None:
    """Run the command line."""
    log_to_terminal("%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # Pillow's; our own limits list the image as a failure
    build_app({point.name: f"{point.module}:{point.attr}" for point in entry_points(group="mof.commands")})()


def _version(asked: bool) -> None:
    if asked:
        from encoders.runs import versions  # slow

        say(f"mof {versions('mof-vig')['mof-vig']}")
        raise typer.Exit


def _mof(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="MOF_DEBUG", help="Show the traceback of an error.")] = False,
) -> None:
    """See and mend what vision-language models are blind to."""
