"""These functions write and read Parquet files that hold a digest and the name of their run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from encoders.digests import BLANK, DamagedError, check, seal
from encoders.whole_files import write_bytes

RUN, FILE, DIGEST = b"mof_run", b"mof_file", b"mof_digest"


class ForeignError(ValueError):
    """A ForeignError says that an undamaged file belongs to another run, or has another name. The message names the file."""


def write_table(path: Path, table: pa.Table, run: str = "") -> None:
    """Write the table whole, as Parquet.

    Args:
        run: the unique name of the folder's run. A file with it is refused in the folder of another run, and under another name.
    """
    place = {RUN: run.encode(), FILE: path.name.encode()} if run else {}
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **place, DIGEST: BLANK.encode()}), buffer)
    write_bytes(path, seal(buffer.getvalue().to_pybytes()))


def read_table(path: Path, columns: Sequence[str] | None = None, run: str | None = None) -> pa.Table:
    """Return the table that `write_table` wrote. It also reads a file of an earlier release, which has neither digest nor run.

    Args:
        columns: the columns to return; by default all columns.
        run: the run that the file must belong to; None allows any run.

    Raises:
        DamagedError: for a file that was changed or cannot be read.
        ForeignError: for a file of another run, or a copy under another name.
    """
    try:
        content = path.read_bytes()
        check(content, path)
        file = pq.ParquetFile(pa.BufferReader(content))  # the threads of `read_table` cost three times the CPU
        table = file.read(use_threads=False) if columns is None else file.read(list(columns), use_threads=False).select(list(columns))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DamagedError(f"{path} cannot be read ({error})") from error
    metadata = table.schema.metadata or {}
    refuse_foreign(path, metadata.get(RUN, b"").decode(), metadata.get(FILE, b"").decode(), run)
    return table.replace_schema_metadata({key: value for key, value in metadata.items() if key not in (RUN, FILE, DIGEST)} or None)


def run_of(path: Path) -> str:
    """Return the run that a file names, or "" for a file of an earlier release or a damaged file."""
    try:
        content = path.read_bytes()
        check(content, path)
        return (pq.read_schema(pa.BufferReader(content)).metadata or {}).get(RUN, b"").decode()
    except (DamagedError, pa.ArrowException, OSError):
        return ""


def refuse_foreign(path: Path, run: str, name: str, wanted: str | None) -> None:
    """Raise a ForeignError unless the file belongs to the run `wanted` and has the name that it holds.

    Files of earlier releases hold neither run nor name, and pass.
    """
    if run and name != path.name:
        raise ForeignError(f"{path} is a copy of {name}")
    if run and wanted and run != wanted:
        raise ForeignError(f"{path} belongs to another run than its folder")
