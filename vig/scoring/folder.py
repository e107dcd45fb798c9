"""A scoring run fills a folder with parquet shards, a manifest and the lists of the records without a score.

    _manifest.json                  format, identity of the run, whether it is complete, and the numbers of records with and without score
    shard-PROCESS-NUMBER.parquet    a row per record, columns as in `vig.scoring.score_table.SCHEMA`
    _rejected.jsonl                 {"id", "reason"} of every record that could not be scored
    _text_only.jsonl                {"id"} of every record without an image
    _lock-PROCESS                   locked while a run is alive (`encoders.runs`); a file that is left behind locks nothing

A run may be killed at any time and resumed. Every file is written whole and has a digest: in itself (`encoders.digests`), or in the
manifest. Each shard names its run. Readers of Parquet, such as pandas, take the folder for one table, since they leave out files whose
names begin with an underscore. In folders of earlier releases, no name begins so.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from encoders.digests import DamagedError, damaged, file_digest
from encoders.runs import RunFile, RunLock, run_digest
from encoders.storage import fetched, located, remove, url_of
from encoders.tables import ForeignError, read_table, run_of
from encoders.whole_files import write_text
from vig.processes import Processes

MANIFEST, REJECTED, TEXT_ONLY = "_manifest.json", "_rejected.jsonl", "_text_only.jsonl"
SHARDS = "shard-*.parquet"
FORMAT = 1  # format version of the whole folder
RECORDS_DIGEST = "records_xxh3"
"""Under this name, "about" in the manifest has the digest of the file of records, if all of them came from a file."""

logger = logging.getLogger(__name__)


class ScoreFolder:
    """ScoreFolder is the output folder of a run, for all of its processes. While the context is open, no other run may write to it.

    Args:
        folder: a new or empty folder, or the folder of an earlier run with the same identity and any number of processes; or a URL
            (`encoders.storage`).
        identity: see `vig.scoring.identity.scoring_identity`.
        schema: columns of the rows.

    Raises:
        ValueError: for a folder that holds other files or another run (the message names the differences), or to which a run is writing.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], schema: pa.Schema, processes: Processes) -> None:
        self.path, self._schema, self._rank = located(folder), schema, processes.rank
        self._lock, self._manifest = RunLock(self.path, self._rank), manifest_file(self.path)
        try:
            processes.on_first(lambda: self._open(identity))
            if self._rank:
                fetched(self.path)
                self._lock.take()
            manifest = self._manifest.read()
            self._complete: bool = manifest.get("complete", False)
            self.calibration: dict[str, Any] = manifest.get("calibration", {})
            """The calibration of an earlier run here (`vig.scoring.calibration`), with the digest of its records' ids."""
            self._run = run_digest(manifest["identity"])
        except BaseException:
            self._lock.release()
            raise
        prefix = f"shard-{self._rank:04d}-"
        self._numbers = {int(path.stem.removeprefix(prefix)) for path in self.path.glob(f"{prefix}*.parquet")}
        self.shard = (str(self.path.absolute()).replace("{", "{{").replace("}", "}}") + f"/{prefix}{{:05d}}.parquet", self._run)
        """The path of the shard with a number, to be formatted, and the run that it names."""

    def __enter__(self) -> ScoreFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def _open(self, identity: Mapping[str, Any]) -> None:
        fetched(self.path)
        self._manifest.refuse_foreign()
        self._lock.take()
        self._remove_damaged()
        self._mend_manifest(identity)
        begun = any(self.path.glob(SHARDS)) or file_of(self.path, REJECTED).is_file()  # False if, say, the chat template was refused
        self._manifest.claim(identity, begun=begun)

    def _remove_damaged(self) -> None:
        """Delete shards that cannot be read any more, so that their records are scored again."""
        for path in self.path.glob(SHARDS):
            try:
                read_table(path)
            except DamagedError as error:
                logger.warning("%s; its records are scored again", error)
                remove(path)

    def _mend_manifest(self, identity: Mapping[str, Any]) -> None:
        """Write a damaged manifest anew if the shards show that the folder belongs to this run."""
        try:
            if self._manifest.path.is_file():
                self._manifest.read()
        except DamagedError as error:
            if {run_of(path) for path in self.path.glob(SHARDS)} == {run_digest(identity)}:
                logger.warning("%s; it is written anew, since all shards here are of this run", error)
                self._manifest.write(identity)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of all shards, a table of `columns`."""
        return read_shards(fetched(self.path), self._schema, self._run, columns)

    def known(self) -> dict[str, tuple[str, str, str]]:
        """Return id -> (digest, image_digest, image_files) of every record that has a row; the last two are "" in older folders."""
        names = [name for name in ("id", "digest", "image_digest", "image_files") if name in self._schema.names]
        ids, *columns = (column.to_pylist() for column in self.read(names).columns)
        columns += [[""] * len(ids)] * (3 - len(columns))
        return dict(zip(ids, zip(*columns, strict=True), strict=True))

    def number(self, item: int) -> int:
        """Return the number of an item's shard: the item's own, unless an earlier run wrote a shard of this number."""
        return item + (max(self._numbers) + 1 if item in self._numbers else 0)

    def begin(self) -> None:
        """Note that there will be more shards."""
        if self._complete:  # this run has more records than the last run
            self._write_manifest(complete=False)
            self._complete = False

    def finish(
        self, text_only: Iterable[str], failures: Mapping[str, str], about: Mapping[str, str], calibration: Mapping[str, Any] | None = None
    ) -> None:
        """Mark the run as complete. A single process calls this when all are done.

        Args:
            about: texts for readers that are no part of the run's identity: the folder of the model, and `RECORDS_DIGEST`.
            calibration: see `vig.scoring.calibration`.
        """
        text, rejected = [{"id": id} for id in text_only], [{"id": id, "reason": reason} for id, reason in failures.items()]
        self._write_lines(TEXT_ONLY, text)
        self._write_lines(REJECTED, rejected)
        shards = sorted(self.path.glob(SHARDS))
        rows = sum(pq.read_metadata(path).num_rows for path in shards)
        files = {path.name: file_digest(path) for path in (file_of(self.path, TEXT_ONLY), file_of(self.path, REJECTED), *shards)}
        self._write_manifest(
            complete=True,
            scores=rows,
            rejected=len(rejected),
            text_only=len(text),
            files=files,
            about=dict(about),
            calibration=dict(calibration or {}),
        )

    def _write_manifest(self, **outcome: Any) -> None:
        self._manifest.write(self._manifest.read()["identity"], **outcome)

    def _write_lines(self, name: str, rows: Iterable[Mapping[str, str]]) -> None:
        write_text(file_of(self.path, name), "".join(json.dumps(row) + "\n" for row in rows))


def refuse_occupied(folder: str | os.PathLike[str], settings: Mapping[str, Any], null: str) -> None:
    """Refuse a folder that holds other files, or scores with other settings, before a model is loaded. `ScoreFolder` checks the rest.

    Args:
        settings: entries of the run's identity.
        null: the name of the null image.

    Raises:
        ValueError: as `ScoreFolder`.
    """
    path = located(folder)
    if url_of(path) is not None:  # `ScoreFolder` fetches it
        return
    manifest = manifest_file(path)
    manifest.refuse_foreign()
    if not any(path.glob(SHARDS)):
        return
    try:
        identity = manifest.read()["identity"]
    except DamagedError:  # `ScoreFolder` may be able to write it anew
        return
    manifest.claim({**identity, **settings, "null": {**identity["null"], "name": null}})


def file_of(folder: Path, name: str) -> Path:
    """Return the path of MANIFEST, REJECTED or TEXT_ONLY, which has no underscore in a folder of an earlier release."""
    earlier = folder / name.removeprefix("_")
    return earlier if earlier.is_file() else folder / name


def manifest_file(folder: Path) -> RunFile:
    """Return the file of the manifest in a folder of scores. It holds the run's identity, "complete", and numbers of records."""
    return RunFile(file_of(folder, MANIFEST), "scoring run", FORMAT, "give a new folder")


def read_lists(folder: Path, listed: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return the ids of the records without an image, and id -> reason of the records that could not be scored.

    Args:
        listed: file name -> digest, from the manifest; empty for a folder of an earlier release.

    Raises:
        DamagedError: when a file is missing or was changed.
    """
    if faults := damaged(folder, {name: digest for name, digest in listed.items() if not name.endswith(".parquet")}):
        raise DamagedError(f"{'; '.join(faults.values())}; score again with this folder to write it anew")
    text_only, rejected = (
        [json.loads(line) for line in path.read_bytes().split(b"\n") if line] if path.is_file() else []
        for path in (file_of(folder, TEXT_ONLY), file_of(folder, REJECTED))
    )
    return [row["id"] for row in text_only], {row["id"]: row["reason"] for row in rejected}


def read_shards(folder: Path, schema: pa.Schema, run: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of all shards in order. It raises the same errors as `read_shard`."""
    columns = schema.names if columns is None else columns
    empty = pa.schema([schema.field(name) for name in columns]).empty_table()
    return pa.concat_tables([empty, *(read_shard(path, schema, run, columns) for path in sorted(folder.glob(SHARDS)))])


def read_shard(path: Path, schema: pa.Schema, run: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of a shard.

    Raises:
        ValueError: for a shard that cannot be read, or that another version or another run wrote.
    """
    columns = schema.names if columns is None else columns
    try:
        table = read_table(path, columns, run)
    except DamagedError as error:
        raise DamagedError(f"{error}; score again with this folder to fill the gap") from error
    except ForeignError as error:
        raise ForeignError(f"{error}; delete it, and score again with this folder to fill the gap") from error
    if not table.schema.equals(pa.schema([schema.field(name) for name in columns])):
        raise ValueError(f"{path} has other columns than this version writes; score again")
    return table
