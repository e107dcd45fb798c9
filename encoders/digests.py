"""Files that we write and read again hold a digest, so that a damaged, edited or foreign file is noticed when it is read.

A sealed file holds "mof-digest <32 digits> mof-digest". The digits are the XXH3 of the whole file with zeros in place of the digits.
JSON files hold this text under "digest", Parquet files in their metadata. The mark "mof-digest" is there twice, so that no single damaged
byte makes a sealed file look like a file of an earlier release, which has no digest and is read as before. Files of other libraries, for
example of a saved model, are listed with their digests in a sealed JSON file beside them. `MOF_CHECK=off` in the environment skips all
checks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

MARK = b"mof-digest"
BLANK = f"{MARK.decode()} {'0' * 32} {MARK.decode()}"
PATTERN = re.compile(rb"mof-digest ([0-9a-f]{32}) mof-digest")
KEY = "digest"
CHUNK = 2**24  # bytes that are read at a time


class DamagedError(ValueError):
    """A DamagedError says that a file's content was changed since it was written. The message names the file."""


def checks() -> bool:
    """Return whether digests are checked: always, unless the environment has MOF_CHECK=off."""
    return os.environ.get("MOF_CHECK") != "off"


def seal(content: bytes) -> bytes:
    """Return the content with its digest in place of the last `BLANK`."""
    start = content.rindex(BLANK.encode()) + len(MARK) + 1
    return content[:start] + _digest(content, start).encode() + content[start + 32 :]


def check(content: bytes, name: object) -> None:
    """Raise a DamagedError with `name` if sealed content was changed. Content without a mark passes."""
    place = content.rfind(MARK)
    if place < 0 or not checks():
        return
    match = next(iter(PATTERN.finditer(content, max(0, place - len(BLANK)))), None)
    if match is None or match[1].decode() != _digest(content, match.start(1)):
        raise DamagedError(f"{name} is damaged, or was edited: its digest does not fit its content")


def seal_json(content: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """Return the content as sealed JSON. With `indent=None` it is a single line."""
    return seal(json.dumps({**content, KEY: BLANK}, indent=indent).encode())


def open_json(content: bytes, name: object) -> dict[str, Any]:
    """Return the mapping that `seal_json` was given. JSON of earlier releases, which is not sealed, is read too.

    Raises:
        DamagedError: for content that was changed; the message holds `name`.
        ValueError: for content that is no JSON object.
    """
    check(content, name)
    try:
        opened = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} holds no JSON ({error})") from error
    if not isinstance(opened, dict):
        raise ValueError(f"{name}: expected a JSON object, got a {type(opened).__name__}")
    if MARK.decode() in str(opened.get(KEY)):
        del opened[KEY]
    return opened


def file_digest(path: Path) -> str:
    """Return the XXH3 of a file, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def damaged(folder: Path, listed: Mapping[str, str]) -> dict[Path, str]:
    """Return path -> message for each listed file (name -> digest) that is missing or changed."""
    faults = {}
    for name, digest in listed.items() if checks() else ():
        path = folder / name
        if not path.is_file():
            faults[path] = f"{path} is missing"
        elif file_digest(path) != digest:
            faults[path] = f"{path} is damaged, or was edited: its digest is not the digest that was noted"
    return faults


def _digest(content: bytes, start: int) -> str:
    """Return the digest of the content with zeros in place of the 32 digits that begin at `start`."""
    view, digest = memoryview(content), xxhash.xxh3_128()
    for piece in (view[:start], b"0" * 32, view[start + 32 :]):
        digest.update(piece)
    return digest.hexdigest()
