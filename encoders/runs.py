"""Every command that fills a folder uses this kit: it writes whole files, identifies the run of a folder, and lets a single run write."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from secrets import token_hex
from typing import Any

from filelock import FileLock, Timeout

from encoders.digests import DamagedError, open_json, seal_json
from encoders.storage import LOCKS, TEMPORARY, URL, fetched, upload, url_of
from encoders.storage_lock import StorageLock
from encoders.text_files import read_regular

DAY = 24 * 3600


def local_path(path: str | Path) -> Path:
    """Return the path of a file or folder to write, for work whose files must lie on a file system (others: `encoders.storage.located`).

    Raises:
        ValueError: for a URL, such as "s3://bucket/features", also as a `Path`, which keeps only one of the two slashes.
    """
    if URL.match(str(path)):
        raise ValueError(
            f"{path} is a URL, but this command writes to file systems only; `mof encode`, `blind-pairs`, `vig score` and `eval` write to "
            "URLs. Give a folder on a disk, or on a file system that all machines share (NFS, Lustre), and copy it when the command is "
            "done: aws s3 sync FOLDER URL, gcloud storage rsync or rclone. Before a run goes on elsewhere, copy the folder back"
        )
    return path if isinstance(path, Path) else Path(path)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, then rename it. A crash of process or machine leaves no broken file.

    A file in the copy of a folder on other storage is uploaded before it is renamed.
    The temporary name ends like the file's own name, because a few writers choose the format by the suffix. It holds the machine and the
    number of the process for `remove_leftovers`, and random digits: other users with access to the folder cannot put a link there in
    advance, and machines that share the folder write different files.
    """
    temporary = _temporary(path)
    if url_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)  # another machine may have made it in its own copy
    try:
        write(temporary)
        _flush(temporary)  # otherwise a power cut could leave the name without the bytes
        upload(temporary, path)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # so that a full disk has room again
        if isinstance(error, OSError) and error.errno is not None and str(error.filename) in ("None", str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's error names no file
        raise
    _flush(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{_machine()}-{os.getpid()}-{token_hex(8)}-{path.name}")


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, in which its content is made. It is deleted at the end.

    Such folders that killed processes left are deleted first, as in `remove_leftovers`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_dead(folder.parent.glob(f"{TEMPORARY}*-{escape(folder.name)}"))
    temporary = _temporary(folder)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to the file. After a crash the file has either its old or its new content."""
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, in the same way as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, in the same way as `write_text`."""
    write_text(path, json.dumps(content, indent=1))


def replace_folder(folder: Path, new: Path) -> None:
    """Put the folder `new` in the place of `folder`, which may be missing. Both are on the same disk.

    Linux exchanges the two folders in a single step, so a killed process leaves the old or the new folder. Other systems need two steps,
    and for a moment between them no folder has the name.
    """
    if not folder.is_dir():
        new.rename(folder)
        return
    if _exchange(folder, new):
        old = new
    else:
        old = new.with_name(f"{new.name}-before")
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
    shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in a single step. Return False if the system cannot do this."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, flag = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of the kernel
    return exchange is not None and exchange(here, os.fsencode(first), here, os.fsencode(second), flag) == 0


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON-able `content` with its digest (`encoders.digests`), in the same way as `write_bytes`."""
    write_bytes(path, seal_json(content))


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the content that `write_sealed` wrote. It also reads a JSON object of an earlier release, which has no digest.

    Raises:
        DamagedError: for a file that was changed since; the message names it.
        ValueError: for a file that holds no JSON object.
    """
    return open_json(read_regular(path), path)


def write_sealed_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON-able rows as lines with digests, in the same way as `write_bytes`."""
    write_bytes(path, b"".join(seal_json(row, indent=None) + b"\n" for row in rows))


def read_sealed_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows that `write_sealed_lines` wrote. It also reads JSON objects of an earlier release.

    Raises:
        DamagedError: for a line that was changed; the message names file and line.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            rows += [open_json(line, path)] if line.strip() else []
        except ValueError as error:
            raise DamagedError(f"{path}, line {number}: {error}") from error
    return rows


def remove_unfinished(folder: Path) -> None:
    """Delete the unfinished files of a killed process. Only the process that holds the folder's lock may call this."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if not path.is_dir():  # `unfinished_folder` makes folders, perhaps in a process that is alive
            path.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Delete the unfinished files that killed processes left of the file `path` and of files beside it with the same stem.

    Whether a process on another machine lives is unknown here, so its file goes only after a day without a change.
    """
    _remove_dead(path.parent.glob(f"{TEMPORARY}*-{escape(path.stem)}.*"))


def _remove_dead(leftovers: Iterable[Path]) -> None:
    from psutil import pid_exists  # only commands that write single files need it

    for leftover in leftovers:
        machine, process, *_ = leftover.name.removeprefix(TEMPORARY).split("-")
        with suppress(OSError):  # it is gone by now, or another user's
            if machine == _machine() and process.isdecimal():
                dead = not pid_exists(int(process))
            else:
                dead = time.time() - leftover.stat().st_mtime > DAY
            if dead and leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            elif dead:
                leftover.unlink()


@cache
def _machine() -> str:
    """Return 8 hexadecimal digits for this machine, or for this container, which has process numbers of its own."""
    processes = Path("/proc/self/ns/pid")  # of Linux
    count = processes.stat().st_ino if processes.exists() else ""
    return hashlib.sha256(f"{platform.node()} {count}".encode()).hexdigest()[:8]


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
        self._remote = StorageLock(folder / "_lock-0000", _machine()) if rank == 0 and url_of(folder) else None

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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
