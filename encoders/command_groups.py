"""command_group is the base of the command line. It imports a command when it is called, and prints an error in a single line.

Options also work under the names that they had in earlier releases.
"""

from __future__ import annotations

import ast
import dataclasses
import errno
import functools
import inspect
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from encoders.terminal import say

Target = str | Callable[..., None]
"""A command is a function, or the "module:attribute" of a function or of a group (`typer.Typer`)."""

OLD_SPELLINGS = {"image-folder": "images", "out": "output", "output-dir": "output"}
"""Name of an option in earlier releases -> its name today. The old names still work, but no help text shows them."""

PACKAGES = ("encoders", "mof", "vig")
REMEDIES = {
    errno.ENOENT: "give a path that exists",
    errno.EISDIR: "it is a folder, give a file",
    errno.ENOTDIR: "a file is in the way of a folder",
    errno.EEXIST: "a file is there, give a folder",
    errno.ENOSPC: "make room, then call the same command again",
    errno.EACCES: "this user may not open it",
}
"""Reason why a file could not be opened -> advice for the user."""
STYLE: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}


def command_group(
    commands: Mapping[str, Target],
    *,
    help: str | None = None,
    callback: Callable[..., None] | None = None,
    alone: bool = False,
    name: str | None = None,
) -> typer.Typer:
    """Return a group of commands that are imported when they are called.

    Args:
        commands: name -> command. The help text of a "module:attribute" is read from its source and needs no import.
        help: help text of the group; None takes the docstring of `callback`.
        callback: a function with options of the group itself; it is called before each command.
        alone: call `callback` also when no command is given, in place of the help text.
        name: name of the program, for the outermost group.
    """
    group_class = type("LateGroup", (LateGroup,), {"targets": dict(commands)})
    names = {"token_normalize_func": _name_today}  # the commands of the group inherit this setting
    app = typer.Typer(name=name, cls=group_class, no_args_is_help=not alone, invoke_without_command=alone, context_settings=names, **STYLE)
    text = help or (callback.__doc__ if callback else None)
    app.callback(help=text)(_ungrouped(callback or (lambda: None)))  # an app without commands is a group only if it has a callback
    return app


def _ungrouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with an option for each field of the parameters that are dataclasses, because typer knows no groups of options.

    Such a parameter takes keywords only. It stands behind the others, and so do its options in the help text.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    if not groups:
        return command
    parameters = [parameter.replace(annotation=hints.get(name, Any)) for name, parameter in inspect.signature(command).parameters.items()]
    options = [parameter for parameter in parameters if parameter.name not in groups]
    for group in groups.values():
        own = get_type_hints(group, include_extras=True)
        options += [option.replace(annotation=own[name]) for name, option in inspect.signature(group).parameters.items()]

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        for name, group in groups.items():
            arguments[name] = group(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(group)})
        command(**arguments)

    run.__signature__ = inspect.Signature([option.replace(kind=option.KEYWORD_ONLY) for option in options])  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def resumes(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command that resumes when it is called again, so that the message of Ctrl-C says so."""
    return _advising(command, "the same command goes on where it stopped")


def starts_over(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command that writes its file at the end, so that the message of Ctrl-C says that nothing was written.

    Unfinished files that a killed run left beside the command's `output` are deleted first.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        from encoders.whole_files import remove_leftovers  # slow for `mof --help`

        if isinstance(options.get("output"), Path):
            remove_leftovers(options["output"])
        command(*args, **options)

    return _advising(run, "nothing was written; the same command starts from the beginning")


def _advising(command: Callable[..., None], advice: str) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(advice) from None

    return run


class LateGroup(TyperGroup):
    """LateGroup is a group of commands. It imports a command when it is called, and reports an error of the command in a single line."""

    targets: ClassVar[Mapping[str, Target]] = {}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: TyperCommand(name) for name in self.targets}  # only their names are used

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command, imported, or None for an unknown name."""
        if cmd_name not in self.targets:
            return None
        target = self.targets[cmd_name]
        loaded = EntryPoint(cmd_name, target, "").load() if isinstance(target, str) else target
        if isinstance(loaded, typer.Typer):
            return typer.main.get_group(loaded)
        app = typer.Typer(**STYLE)
        app.command(cmd_name)(_ungrouped(loaded))
        return typer.main.get_command(app)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table of commands without importing them."""
        width = formatter.width - 6 - max(map(len, self.targets))
        rows = [(name, TyperCommand(name, help=_help_of(target)).get_short_help_str(width)) for name, target in self.targets.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, also with `--debug` behind the command and with `--ray` without an address."""
        if ctx.parent is None and any(parameter.name == "debug" for parameter in self.params) and "--debug" in args:
            args = ["--debug", *(argument for argument in args if argument != "--debug")]
        if ctx.parent is None:
            behind = zip(args, [*args[1:], "-"], strict=True)
            args = ["--ray=" if argument == "--ray" and following.startswith("-") else argument for argument, following in behind]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. The exit code is 2 for refused input, 1 for a bug and 130 for Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            say("; ".join(["mof: interrupted", *map(str, stop.args)]), err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if isinstance(error, BrokenPipeError) or type(error).__module__.partition(".")[0] in ("typer", "click"):
                raise  # typer handles a closed pipe, usage errors and exits
            if ctx.find_root().params.get("debug"):
                traceback.print_exception(error)
            refused = _is_refusal(error)
            message = " ".join((_file_error(error) if isinstance(error, OSError) else str(error)).split())
            if refused:
                message = _with_options(message, self.get_command(ctx, ctx.invoked_subcommand or ""))
            say(f"mof: {message}" if refused else f"mof: {_bug_report(error, message)}", err=True)
            raise typer.Exit(2 if refused else 1) from None


def _with_options(message: str, command: Any) -> str:
    """Return the message with options in place of arguments of Python functions: "--max-length" for "max_length".

    Only names with an underscore are replaced, because other names are words of the language. Paths stay as they are, and so do names
    before a colon, which are entries of an identity.
    """
    options = (
        {parameter.name: parameter.opts[0] for parameter in command.params if parameter.param_type_name == "option"} if command else {}
    )
    options |= {old.replace("-", "_"): options[new] for old, new in OLD_SPELLINGS.items() if new in options}
    for name in (name for name in options if "_" in name):
        message = re.sub(rf"(?<![\w/.-]){name}(?![\w/:-]|\.\w)", options[name], message)
    return message


def _is_refusal(error: Exception) -> bool:
    """Return whether the error is about the user's input: a ValueError of our own, or an OSError about files or connections.

    A ValueError of a library is a bug, because our code called the library with wrong values.
    """
    if isinstance(error, OSError):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "")
    return isinstance(error, ValueError) and any(name.partition(".")[0] in PACKAGES for name in (type(error).__module__, raised_in))


def _file_error(error: OSError) -> str:
    """Return the message of an error about a file or a connection: the file, the reason and the remedy."""
    if error.filename is None or error.strerror is None:
        return str(error)
    remedy = REMEDIES.get(error.errno or 0)
    return f"{error.filename}: {error.strerror}" + (f"; {remedy}" if remedy else "")


def _bug_report(error: Exception, message: str) -> str:
    """Write the traceback into a new log file, and return the line that names it."""
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):  # the second name is torch's
        return f"out of memory: {message}"
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="mof-", suffix=".log", delete=False) as log:
        print("command:", *sys.argv, file=log)
        traceback.print_exception(error, file=log)
    return f"this is a bug, {type(error).__name__}: {message}; please report it with the log {log.name}"


def _name_today(name: str) -> str:
    """Return today's name of an option, without hyphens in front. For an old name, a note is written to stderr."""
    if name in OLD_SPELLINGS:
        say(f"mof: --{name} is now called --{OLD_SPELLINGS[name]}; the old name will go with the next release", err=True)
    return OLD_SPELLINGS.get(name, name)


def _help_of(target: Target) -> str | None:
    """Return the help text of a command, or None for a command without help text.

    It is the docstring of the command, or for a group the argument `help` or the docstring of the `callback`. The text is read from the
    source of "module:attribute", because an import may take seconds.
    """
    if not isinstance(target, str):
        return target.__doc__
    point = EntryPoint("", target, "")
    try:
        spec = find_spec(point.module)
        body = ast.parse(Path(str(spec and spec.origin)).read_bytes()).body
    except (ImportError, OSError, SyntaxError):  # a broken package must not break the help
        return None
    docstrings = {statement.name: ast.get_docstring(statement) for statement in body if isinstance(statement, ast.FunctionDef)}
    assigned = (s.value for s in body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == point.attr)
    options = {keyword.arg: keyword.value for call in assigned if isinstance(call, ast.Call) for keyword in call.keywords}
    if "help" in options:
        return ast.literal_eval(options["help"])
    return docstrings.get(ast.unparse(options["callback"]) if "callback" in options else point.attr)
