"""`rows` yields raw records in order, from a file, a list, a generator or a table. `mof.data.records` parses them."""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from encoders.saved_folders import card_path, check_listed
from mof.data.digests import record_id
from mof.data.forms import TURNS, to_mapping
from mof.data.records import RecordError, shown

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

RawRecord = Mapping[str, Any] | list[Any]  # see `mof.data.records.to_record`


@dataclass(frozen=True)
class UnreadableRow:
    """An UnreadableRow stands for a record that could not be read: a line that is not JSON, or a row that its table cannot decode."""

    id: str
    reason: str


Row = RawRecord | UnreadableRow


@runtime_checkable
class Table(Protocol):
    """A table is an object that returns rows by their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the raw record dicts of a `.json` file (a list), a `.jsonl` file (a dict in each line) or a `.parquet` file (rows).

    JSON is in UTF-8. Images may lie in a column of a `.parquet` file, as Hugging Face data sets keep them.

    Raises:
        RecordError: for a file or line that has another form; the message names it.
    """
    rows = read_rows(path)
    for row in rows:
        if isinstance(row, UnreadableRow):
            raise RecordError(f"{row.id}: {row.reason}")
    return rows


def read_rows(path: str | os.PathLike[str]) -> list[Any]:
    """Return the records as `read_records` does, but a line that is not JSON becomes an `UnreadableRow`.

    Raises:
        RecordError: for a file that has another form, or whose first line is not JSON; the message names the file.
    """
    return list(stream_rows(path))


def stream_rows(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the records that `read_rows` returns, without holding them in memory. The errors are the same.

    For a broken list in a `.json` file, the error is raised only after the records before the fault. A DamagedError
    refuses selected records that do not fit their card.
    """
    path = Path(path)
    check_listed(path, card_path(path), "select the records again")
    empty = True
    for row in READERS.get(path.suffix, _items)(path):
        if empty and isinstance(row, UnreadableRow):
            raise RecordError(f"{row.id}: {row.reason}; expected a .json file of one list, or one dict a line in a .jsonl file")
        empty = False
        yield row
    if empty and not path.read_bytes().strip():
        raise RecordError(f"{path}: the file is empty")


def opened(records: Any) -> Any:
    """Return the records of a file (given by its path), a DataFrame, an Arrow table or a `DatasetDict` with a single split.

    A data set of Hugging Face is returned without its format (torch, numpy, ...), so that rows are plain. Another object is returned
    as it is.

    Raises:
        RecordError: for a dict that is no record or holds several splits, and for a file that cannot be read (`read_rows`).
    """
    if isinstance(records, (str, os.PathLike)):
        return read_rows(records)
    if isinstance(records, pa.Table):
        return records.to_pylist()
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(records, pandas.DataFrame):
        try:
            return pa.Table.from_pandas(records, preserve_index=False).to_pylist()
        except (pa.ArrowException, TypeError):  # a column may hold open images, which Arrow cannot store
            return records.to_dict("records")
    if (datasets := sys.modules.get("datasets")) and isinstance(records, (datasets.Dataset, datasets.IterableDataset)):
        return records.with_format(None)
    if not isinstance(records, Mapping):
        return records
    splits = list(records.values())
    if len(splits) == 1 and not (records.keys() & {*TURNS} or isinstance(splits[0], Mapping)) and isinstance(splits[0], (Table, Iterable)):
        return opened(splits[0])
    raise RecordError(f"expected records one after the other, got a dict of {shown(list(records))}: give a list, or a single split")


def rows(records: Iterable[RawRecord]) -> Iterator[Row]:
    """Yield the records in order, each with a unique id: the second record with the id "7" gets "7#2".

    LLaVA's own files use the id of an image for several records, but scores and selections refer to records by id. A row that a table
    (a Hugging Face data set) cannot decode becomes an `UnreadableRow`.

    Args:
        records: an iterable of records, or an object that `opened` takes.
    """
    return (row for _, row in rows_by_id(records))


def rows_by_id(records: Iterable[RawRecord]) -> Iterator[tuple[str, Row]]:
    """Yield the id and the row of each record of `rows`."""
    times: dict[str, int] = {}
    for row in _rows(opened(records)):
        id = id_of(row)
        if id in times:
            times[id] += 1
            while (numbered := f"{id}#{times[id]}") in times:
                times[id] += 1
            id, row = numbered, _renamed(row, numbered)
        times[id] = 1
        yield id, row


def _rows(records: Any) -> Iterator[Row]:
    if isinstance(records, (Sequence, Iterator)) or not isinstance(records, Table):
        yield from records
        return
    for index in range(len(records)):
        try:
            yield records[index]
        except Exception as error:  # tables raise errors of any kind
            yield UnreadableRow(f"row {index}", f"{type(error).__name__}: {error}")


def _renamed(row: Row, id: str) -> Row:
    if isinstance(row, UnreadableRow):
        return replace(row, id=id)
    row = to_mapping(row)
    return {**row, "id": id} if isinstance(row, Mapping) else UnreadableRow(id, f"expected a dict, got {shown(row)}")


def id_of(raw: Row) -> str:
    """Return the id of a record or of an unreadable row."""
    return raw.id if isinstance(raw, UnreadableRow) else record_id(raw)


def _decoded(content: bytes) -> Any:
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


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                try:
                    row = _decoded(line)
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


def _items(path: Path) -> Iterator[Any]:
    """Yield the items of a JSON list while the file is read, piece by piece."""
    try:
        yield from _pieces(path)
    except (ValueError, RecursionError):  # no list, or a fault; the whole file is parsed to name its place
        content = path.read_bytes()
        try:
            whole = _decoded(content) if content.strip() else []
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
