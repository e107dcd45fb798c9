"""`mof verify` tells whether the files in a folder were changed since they were written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from zipfile import is_zipfile

import typer

from encoders.digests import MARK, DamagedError, check, damaged, open_json
from encoders.runs import run_digest
from encoders.storage import LOCKS, TEMPORARY, fetched
from encoders.terminal import say
from encoders.whole_files import read_sealed

LARGEST = 2**26  # bytes of a file without a digest that is read as JSON
MANIFEST = "manifest.json"
RUN_FILES = ("_manifest.json", MANIFEST, "ledger.json")
"""Files that name the run of their folder."""


def verify(folder: Annotated[Path, typer.Argument(help="Folder that a command of mof wrote, or a folder of several; or a URL.")]) -> None:
    """Compare every file in a folder with its digest, and print a line for each file that is damaged, missing or of another run.

    It checks feature stores, scores, pair tables and ledgers, annotations, evaluations, probes, saved models and checkpoints. Files
    without a digest, which earlier releases or others wrote, are only counted. The exit code is 1 if a file is damaged. The
    command that wrote a damaged file repairs it when it is called again.

    \b
    Example:
      mof verify scores
    """
    folder = fetched(folder, again=True)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: expected a folder that a command of mof wrote")
    os.environ.pop("MOF_CHECK", None)
    done = FolderCheck(folder)
    if not done.files:
        raise ValueError(f"{folder} holds no files: expected a folder that a command of mof wrote")
    for fault in done.faults.values():
        say(fault)
    plain = len(done.files) - len(done.checked & set(done.files))
    say(f"{folder}: {len(done.checked):,} files checked, {len(done.faults):,} damaged; {plain:,} files have no digest")
    if done.faults:
        raise typer.Exit(1)


class FolderCheck:
    """FolderCheck checks all files in a folder and its subfolders.

    Attributes:
        files: all files, except locks and unfinished files.
        checked: the files that have a digest.
        faults: damaged, missing or foreign file -> a sentence that says so.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.files = [path for path in paths if not (path.name.startswith(TEMPORARY) or path.match(LOCKS) or path.suffix == ".lock")]
        self.checked, self.faults = set[Path](), dict[Path, str]()
        kinds: dict[str, Callable[[Path], None]] = {
            ".json": self._json, ".jsonl": self._lines, ".npz": self._square, ".parquet": self._table, ".safetensors": self._shard,
        }  # fmt: skip
        for path in self.files:
            try:
                kinds.get(path.suffix, lambda path: None)(path)
            except ValueError as error:
                self.checked.add(path)
                self.faults.setdefault(path, str(error))
        if not self.faults:
            self._check_stores()

    def _sealed(self, path: Path, content: bytes) -> bool:
        """Return whether the content of a file has a digest, after comparing both."""
        check(content, path)
        if MARK in content:
            self.checked.add(path)
        return MARK in content

    def _json(self, path: Path) -> None:
        """Check a file and the files that it lists."""
        content = path.read_bytes()
        if not content:
            raise ValueError(f"{path} is empty")
        if not self._sealed(path, content):
            _require_json(path, content)
            return
        if isinstance(listed := open_json(content, path).get("files"), dict):
            self.checked |= {path.parent / name for name in listed}
            self.faults = damaged(path.parent, listed) | self.faults

    def _check_stores(self) -> None:
        """Open the feature stores, which compares their files with each other, and read all embeddings."""
        from encoders.store.feature_store import FeatureStore
        from encoders.tables import ForeignError

        for manifest in (path for path in self.files if path.name == MANIFEST and _describes_encoders(path)):
            try:
                store = FeatureStore(manifest.parent)
                for name in store.encoders:
                    if store.manifest[name]["embeddings"]:
                        self.checked |= {store.joined(name)} & set(self.files)  # it is there only if shards are several
                        store.embeddings(name)
            except ValueError as error:
                if isinstance(error, (DamagedError, ForeignError)):  # a store without an image, which a run has just begun, is sound
                    self.faults[manifest] = str(error)

    def _lines(self, path: Path) -> None:
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            try:
                if not self._sealed(path, line):
                    _require_json(path, line)
            except ValueError as error:
                raise ValueError(f"{error} (line {number})") from error

    def _table(self, path: Path) -> None:
        from encoders.tables import read_table

        content = path.read_bytes()
        if self._sealed(path, content):
            read_table(path, [], run=_run_of(path.parent))
        elif not content.endswith(b"PAR1"):
            raise ValueError(f"{path} is cut off, or was edited: it does not end as Parquet files do")

    def _square(self, path: Path) -> None:
        import numpy as np

        if self._sealed(path, path.read_bytes()):
            with np.load(path) as square:
                if (str(square["run"]), str(square["square"])) != (_run_of(path.parent), path.stem):
                    raise ValueError(f"{path} belongs to another search, or is a copy of the square {square['square']}")
        elif not is_zipfile(path):
            raise ValueError(f"{path} is cut off, or was edited: it does not end as .npz files do")

    def _shard(self, path: Path) -> None:
        from encoders.store.shards import Shard

        if path.name.startswith("features-"):
            shard = Shard(path)
            self.checked |= {path} if shard.metadata.get("run") else set()
            shard.check()


def _require_json(path: Path, content: bytes) -> None:
    """Raise a ValueError for a file or line without a digest that was cut off. Lines of JSON, as in POPE's files, are whole too."""
    if len(content) > LARGEST:
        return
    try:
        json.loads(content or b"null")
    except (ValueError, RecursionError):
        try:
            for line in content.split(b"\n"):
                json.loads(line or b"null")
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is cut off, or was edited: it holds no JSON") from None


def _describes_encoders(manifest: Path) -> bool:
    try:
        return bool(read_sealed(manifest).get("encoders"))
    except ValueError:  # a file of another program
        return False


def _run_of(folder: Path) -> str | None:
    """Return the run that the files in a folder should name, or None if the folder says nothing about it, or is damaged itself."""
    try:
        content = next((read_sealed(folder / name) for name in RUN_FILES if (folder / name).is_file()), {})
    except ValueError:
        return None
    return run_digest(content["identity"]) if "identity" in content else content.get("store")
