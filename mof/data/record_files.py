"""Each of these functions yields the raw records of a file: a JSON list, lines of JSON, or a Parquet table. None holds the whole file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from mof.data.records import RecordError

PIECE = 1 << 20  # characters of a file that are read at a time
TABLE_ROWS = 256  # rows of a table that are read at a time; they may hold images
SPACE, COMMA, CLOSE = re.compile(r"\s*"), re.compile(r"\s*,\s*"), re.compile(r"\s*\]")
JOINT = re.compile(r'\}\s*,\s*\{\s*"[^"\\]*"')  # between two items that are dicts, up to the first key
NEAR = 1 << 14  # characters in which the end of an item is looked for
SCAN = json.JSONDecoder().raw_decode
BEHIND = re.compile(r"[\s,\]]")  # characters that may follow an item of a list
DEEPEST = 201  # levels of lists and dicts, the limit of pydantic's parser; Python's own limit depends on the functions that call the parser
TOO_DEEP = f"its lists and dicts lie more than {DEEPEST} deep"
BRACKET = re.compile(r'[\[{]|[\]}]|"(?:[^"\\]|\\.)*+"', re.DOTALL)  # a bracket outside of text, or a text


@dataclass(frozen=True)
class UnreadableRow:
    """An UnreadableRow stands for a record that could not be read: a line that is not JSON, or a row that its table cannot decode."""

    id: str
    reason: str


def decoded(content: bytes) -> Any:
    """Return the value of JSON in UTF-8. pydantic's parser is fast, keeps equal keys once in memory, and reads a little less than json."""
    try:
        return from_json(content, cache_strings="keys")
    except ValueError:  # also a byte order mark, or half a surrogate pair
        text = content.removeprefix(codecs.BOM_UTF8).decode()
        if _is_deep(text, 0, len(text)):
            raise ValueError(TOO_DEEP) from None
        return json.loads(text)


def _is_deep(text: str, start: int, end: int) -> bool:
    return text.count("[", start, end) + text.count("{", start, end) > DEEPEST and _span(text, start)[1] > DEEPEST


def _span(text: str, start: int) -> tuple[int, int]:
    """Return where the JSON list or dict ends that begins at `start`, and the number of its levels. ValueError if it does not end."""
    level = deepest = 0
    for match in BRACKET.finditer(text, start):
        level += (match[0] in "[{") - (match[0] in "]}")
        deepest = max(level, deepest)
        if not level:
            return match.end(), deepest
    raise ValueError("brackets that are not closed")


def _lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                try:
                    row = decoded(line)
                except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                    row = UnreadableRow(f"{path.name}, line {number}", f"not JSON ({error})")
                yield row


def _table_rows(path: Path) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(TABLE_ROWS):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise RecordError(f"{path}: cannot be read as a Parquet file ({error})") from error


def list_items(path: Path) -> Iterator[Any]:
    """Yield the items of a JSON list while the file is read, piece by piece."""
    try:
        yield from _pieces(path)
    except (ValueError, RecursionError):  # no list, or a fault; the whole file is parsed to name its place
        content = path.read_bytes()
        try:
            whole = decoded(content) if content.strip() else []
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{path}: not JSON ({error}); expected a file of one list, or one dict a line in a .jsonl file") from None
        if not isinstance(whole, list):
            raise RecordError(f"{path}: expected a list of records, got a {type(whole).__name__}; one dict a line is .jsonl") from None
        assert not whole, "a sound list is read in pieces"


def _pieces(path: Path) -> Iterator[Any]:
    """Yield the items of a JSON list. A ValueError or RecursionError says that the file is no JSON list."""
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(PIECE).lstrip()
        if not text.startswith("["):
            raise ValueError("no list")
        place, gap, size, joint = 1, SPACE, PIECE, ""
        while True:
            try:
                start = gap.match(text, place)
                item, end = _item(text, start.end() if start else len(text), joint)
                if not BEHIND.match(text, end):
                    raise ValueError("the item may go on")
            except ValueError:
                if close := CLOSE.match(text, place):
                    break
                more = file.read(size)
                if not more:
                    raise
                text, place, size = text[place:] + more, 0, 2 * size  # twice as much, to parse a long item a few times only
                continue
            number += 1
            yield replace(item, id=f"{path.name}, record {number}") if isinstance(item, UnreadableRow) else item
            if not joint or not text.startswith(joint, end - 1):
                between = JOINT.match(text, end - 1)
                joint = between[0] if between else ""
            place, gap, size = end, COMMA, PIECE
        if text[close.end() :].strip() or file.read().strip():
            raise ValueError("text behind the list")


def _item(text: str, start: int, joint: str) -> tuple[Any, int]:
    """Return the JSON value that starts there, and where it ends; an UnreadableRow for a value that lies too deep. ValueError for no value.

    Args:
        joint: the text between the two items before, such as '}, {"id"'. Most items end where it comes next.
    """
    end = text.find(joint, start, start + NEAR) + 1 if joint else 0
    if end:
        try:
            return from_json(text[start:end], cache_strings="keys"), end
        except ValueError:  # it also stands within this item
            pass
    try:
        item, end = SCAN(text, start)
    except RecursionError:
        item, end = None, _span(text, start)[0]
    return (UnreadableRow("", TOO_DEEP) if _is_deep(text, start, end) else item), end


READERS = {".jsonl": _lines, ".parquet": _table_rows}  # all other files hold a list
