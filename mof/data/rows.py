"""Raw records one after the other: out of a file, a list, a generator or a table. `mof.data.records` parses them."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mof.data.records import RecordError, record_id

PIECE = 2**20  # characters of a file that are read at a time
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
RawRecord = Mapping[str, Any] | list[Any]  # as `mof.data.records.to_record` reads it


@dataclass(frozen=True)
class UnreadableRow:
    """Stands for a record that could not be read: a line that is not JSON, or a row that its table cannot decode."""

    id: str
    reason: str


Row = RawRecord | UnreadableRow


@runtime_checkable
class Table(Protocol):
    """An object that gives rows by their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the raw record dicts of a `.json` file (one list) or a `.jsonl` file (one dict a line), in UTF-8.

    Raises:
        RecordError: naming the file (and line) that has another form.
    """
    rows = read_rows(path)
    for row in rows:
        if isinstance(row, UnreadableRow):
            raise RecordError(f"{row.id}: {row.reason}")
    return rows


def read_rows(path: str | os.PathLike[str]) -> list[Any]:
    """Return the records like `read_records`, but a line that is not JSON becomes an `UnreadableRow`.

    Raises:
        RecordError: naming the file, also when its first line is not JSON: the file is then of another kind.
    """
    path = Path(path)
    content = path.read_bytes()
    if not content.strip():
        raise RecordError(f"{path}: the file is empty")
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
        records = [_parse_json(line, f"{path.name}, line {number}") for number, line in lines]
    else:
        records = _parse_json(content, str(path))
    first = records[0] if isinstance(records, list) and records else records
    if isinstance(first, UnreadableRow):
        raise RecordError(f"{first.id}: {first.reason}; expected a .json file of one list, or one dict a line in a .jsonl file")
    if not isinstance(records, list):
        raise RecordError(f"{path}: expected a list of records, got a {type(records).__name__}; one dict a line is .jsonl")
    return records


def rows(records: Iterable[RawRecord]) -> Iterator[Row]:
    """Yield the records in order. A row that a table (a Hugging Face data set) cannot decode becomes an `UnreadableRow`."""
    if isinstance(records, (Sequence, Iterator)) or not isinstance(records, Table):
        yield from records
        return
    for index in range(len(records)):
        try:
            yield records[index]
        except Exception as error:  # tables raise any kind
            yield UnreadableRow(f"row {index}", f"{type(error).__name__}: {error}")


def id_of(raw: Row) -> str:
    """Return the id of a record or of an unreadable row."""
    return raw.id if isinstance(raw, UnreadableRow) else record_id(raw)


def unique_ids(records: Sequence[Row]) -> list[str]:
    """Return the ids of all records. A ValueError names ids that are used twice: scores and selections refer to records by id."""
    ids = [id_of(record) for record in records]
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"record ids must be unique; {len(twice)} used more than once: {', '.join(twice[:10])}")
    return ids


def _parse_json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.removeprefix(codecs.BOM_UTF8).decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return UnreadableRow(where, f"not JSON ({error})")


# --- rows that are read as they are needed
def stream_rows(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the records that `read_rows` returns, without holding them in memory; the errors are the same.

    A list in a `.json` file is found to be broken only where it breaks.
    """
    path = Path(path)
    records = _lines(path) if path.suffix == ".jsonl" else _items(path)
    first = next(records, None)
    if first is None or isinstance(first, UnreadableRow):
        yield from read_rows(path)  # an empty list, or the error
    else:
        yield first
        yield from records


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_json(line.removesuffix(b"\n"), f"{path.name}, line {number}")


def _items(path: Path) -> Iterator[Row]:
    try:
        rest = yield from _whole_items(path)
    except UnicodeDecodeError:
        rest = ""
    if not re.fullmatch(r"[ \t\r\n]*\][ \t\r\n]*", rest):
        read_rows(path)  # raises the error


def _whole_items(path: Path) -> Generator[Row, None, str]:
    """Yield the items of a JSON list, as far as it is sound. Return what is left of the file behind them."""
    decoder, rest, size = json.JSONDecoder(), "", PIECE
    before, behind = re.compile(r"[ \t\r\n]*\[[ \t\r\n]*"), re.compile(r"[ \t\r\n]*[],]")
    with path.open(encoding="utf-8-sig") as file:
        while piece := file.read(size):
            text, place = rest + piece, 0
            while match := before.match(text, place):
                try:
                    item, end = decoder.raw_decode(text, match.end())
                except (ValueError, RecursionError):
                    break
                if not behind.match(text, end):  # a number may go on in the next piece
                    break
                yield item
                place, before = end, _COMMA
            rest, size = text[place:], PIECE if place else 2 * size  # an item longer than all pieces so far is tried seldom
    return rest
