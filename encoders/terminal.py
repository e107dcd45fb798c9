"""Text of strangers (names of files, ids of records, answers of models) is shown on a terminal without its control characters.

A terminal takes orders from control characters: a file name could change the window's title, hide a line or fill the clipboard.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

_ORDERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line end, marks that turn the direction of writing, and halves of characters."""


def plain(text: str) -> str:
    r"""Return the text with every control character written out, as in "\x1b"."""
    return _ORDERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(text: object = "", *, err: bool = False) -> None:
    """Print the text, without control characters, on the standard output or on the standard error."""
    import typer  # slow for programs without a command line

    typer.echo(plain(str(text)), err=err)


class PlainFormatter(logging.Formatter):
    """PlainFormatter writes messages of the log without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def log_to_terminal(format: str, **options: Any) -> None:
    """Send the log to the standard error, as `logging.basicConfig` does with these options."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter(format))
    logging.basicConfig(handlers=[handler], **options)
