"""Text files that a user names are read here. They may be anything: a pipe, a photo, a list that is nested a million times."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

LONGEST = 300
"""Characters of an error of a library."""
LARGEST = 2**32
"""Bytes of a file, which is read into memory whole."""


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: for a file that cannot be opened.
        ValueError: for a pipe or a device, which may never end, and for a file of more than `LARGEST` bytes.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: it is no regular file, but a pipe or a device; write its content to a file first")
        if status.st_size > LARGEST:
            raise ValueError(f"{path}: its {status.st_size:,} bytes are more than the allowed {LARGEST:,}")
        return file.read()


def read_utf8(path: Path) -> str:
    """Return the text of a regular file, without a byte order mark.

    Raises:
        OSError: for a file that cannot be opened.
        ValueError: for any file that is no text in UTF-8.
    """
    try:
        return read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 ({error.reason} at byte {error.start})") from error


def parse_json(text: str | bytes, name: object, *, unique: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        unique: refuse an object with two values of the same key, of which JSON readers keep the last.

    Raises:
        ValueError: for another text, and for JSON that is nested too deep; the message holds `name`.
    """
    try:
        return json.loads(text, object_pairs_hook=_object if unique else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error})") from error


def one_line(error: Exception) -> str:
    """Return the text of a library's error in a line of a sane length: it may list every model that the library knows."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"two values of {twice!r}")
    return values
