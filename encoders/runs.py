"""A folder belongs to a single run: a file in it identifies the run, and a lock lets only this run write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from encoders.digests import DamagedError
from encoders.storage import LOCKS, fetched, url_of
from encoders.storage_lock import StorageLock
from encoders.whole_files import local_path, read_sealed, remove_unfinished, this_machine, write_sealed


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, or "source" for a package that is used without being installed."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "source"

    return {package: installed(package) for package in packages}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a line for each entry that differs. A nested entry is named like "versions.torch"."""
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key}: {before!r} there, {now!r} now"


def run_digest(identity: Mapping[str, Any]) -> str:
    """Return 32 hexadecimal digits that identify a run. The files in its folder hold them."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:32]


class RunFile:
    """RunFile is the JSON file that identifies the run of a folder: {"format": 1, "identity": {...}} and the entries that the run adds.

    Args:
        path: the file, directly in the run's folder.
        what: the name of the kind of run, for messages: "scoring run".
        format: version of everything in the folder; a folder of another version is refused.
        remedy: advice for a user who gave the folder of another run, for messages: "give a new --output".
        own: patterns of files, besides locks and hidden files, that may be in the folder before the first run.
    """

    def __init__(self, path: Path, what: str, format: int, remedy: str, own: Sequence[str] = ()) -> None:
        self.path, self.what, self.format, self.remedy, self._own = local_path(path), what, format, remedy, (LOCKS, *own)

    def read(self) -> dict[str, Any]:
        """Return the file's content.

        Raises:
            DamagedError: for a damaged file.
            ValueError: for a folder without the file, or a file of another format.
        """
        if not self.path.is_file():
            raise ValueError(f"{self.path.parent} holds no {self.path.name}: expected the folder of a {self.what}")
        try:
            content = read_sealed(self.path)
            given = content.get("format", 1), content["identity"]  # the files of early releases have no format number
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError(
                f"{self.path} is damaged, or not of a {self.what} ({type(error).__name__}: {error}); put back a copy, or {self.remedy}"
            ) from error
        if given[0] != self.format:
            raise ValueError(f"{self.path.parent} has format {given[0]!r}, this version of mof-vig reads {self.format}; {self.remedy}")
        return content

    def write(self, identity: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Write the run's identity and `more`, all JSON-able, in place of the old content. Return the new content."""
        content = {"format": self.format, "identity": dict(identity), **more}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(self.path, content)
        return content

    def claim(self, identity: Mapping[str, Any], *, begun: bool = True) -> dict[str, Any]:
        """Give the folder to the run with this identity, or check that it has the folder already. Return the file's content.

        Args:
            identity: JSON-able, with text for anything that JSON does not know.
            begun: whether the folder holds work of its run. If not, another run may take over the folder.

        Raises:
            ValueError: for a folder that holds another run (with the differences) or files of no run.
        """
        identity = json.loads(json.dumps(identity, default=str))
        if not self.path.is_file():
            self.refuse_foreign()
            return self.write(identity)
        content = self.read()
        different = list(differences(content["identity"], identity))
        if not different:
            return content
        if not begun:
            return self.write(identity)
        raise ValueError(f"{self.path.parent} holds another {self.what}; {self.remedy}. Different:\n  " + "\n  ".join(different))

    def refuse_foreign(self) -> None:
        """Raise a ValueError for a folder that holds files and no run, as `claim` does. Call it before a lock is put into the folder."""
        folder = self.path.parent
        files = () if self.path.is_file() else (path for path in folder.rglob("*") if path.is_file())
        for path in files:
            inside = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in inside.parts)  # unfinished files, or a desktop's own
            if not (hidden or any(path.match(pattern) for pattern in self._own)):
                raise ValueError(f"{folder} holds {inside} and no {self.what}; {self.remedy}")


class RunLock:
    """RunLock is a context manager that lets only a single run write to a folder, which is made. The run may have several processes.

    Each process holds a separate lock file, which the operating system frees when the process dies. The first process takes its lock
    before the other processes do, and checks that all other locks are free, because a few processes of a killed run may live on for a
    while. The first process of a run whose folder is a copy also holds a lock in the storage. When it has the lock, the copy is made equal
    to the storage, because another machine may have gone on until then. Then the unfinished files of killed processes are deleted.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder, self._rank = folder, rank
        self._own = FileLock(folder / f"_lock-{rank:04d}")
        self._remote = StorageLock(folder / "_lock-0000", this_machine()) if rank == 0 and url_of(folder) else None

    def take(self) -> None:
        """Take the lock. The first process must do so before the others.

        Raises:
            ValueError: while a process of another run holds a lock.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._take(self._own)
        for path in self._folder.glob(LOCKS) if self._rank == 0 else ():
            if path != Path(self._own.lock_file):
                lock = FileLock(path)
                self._take(lock)
                lock.release()
        if self._remote is not None:
            try:
                self._remote.take()
                fetched(self._folder)
            except BaseException:
                self.release()  # a later try of the same process finds the folder free
                raise
        if self._rank == 0:
            remove_unfinished(self._folder)

    def release(self) -> None:
        """Free the lock, taken or not."""
        if self._remote is not None:
            self._remote.release()
        self._own.release(force=True)

    def __enter__(self) -> RunLock:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _take(self, lock: FileLock) -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run is writing to {self._folder} and still alive; wait for it or end it, then run this again to go on "
                "with what it saved, or give another folder"
            ) from None
