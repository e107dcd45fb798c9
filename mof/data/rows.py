"""`rows` yields raw records in order, from a file, a list, a generator or a table. `mof.data.records` parses them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from encoders.saved_folders import card_path, check_listed
from mof.data.digests import record_id
from mof.data.forms import TURNS, to_mapping
from mof.data.record_files import READERS, UnreadableRow, list_items
from mof.data.records import RecordError, shown

RawRecord = Mapping[str, Any] | list[Any]  # see `mof.data.records.to_record`
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
    for row in READERS.get(path.suffix, list_items)(path):
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
