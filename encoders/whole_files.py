"""Files and folders are written as a whole: a crash leaves the old content or the new content, never a part of it.

A content is made under a temporary name and then renamed. What a killed process leaves under temporary names is deleted later.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from secrets import token_hex
from typing import Any

from encoders.digests import DamagedError, open_json, seal_json
from encoders.storage import TEMPORARY, URL, upload, url_of
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
    return path.with_name(f"{TEMPORARY}{this_machine()}-{os.getpid()}-{token_hex(8)}-{path.name}")


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
            if machine == this_machine() and process.isdecimal():
                dead = not pid_exists(int(process))
            else:
                dead = time.time() - leftover.stat().st_mtime > DAY
            if dead and leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            elif dead:
                leftover.unlink()


@cache
def this_machine() -> str:
    """Return 8 hexadecimal digits for this machine, or for this container, which has process numbers of its own."""
    processes = Path("/proc/self/ns/pid")  # of Linux
    count = processes.stat().st_ino if processes.exists() else ""
    return hashlib.sha256(f"{platform.node()} {count}".encode()).hexdigest()[:8]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
