"""A folder may lie on storage that fsspec knows, such as "s3://bucket/features". Each machine works in a copy on a disk of its own.

A job first makes the copy equal to the storage (`fetched`). Each file that it finishes is uploaded whole before it gets its name in the
copy (`encoders.whole_files.write_whole`), so a file counts only if it is in the storage. The path of a copy holds the URL, so that a
process on any machine knows where a file belongs: <MOF_COPIES>/mof-vig-copies/s3/bucket/features. The environment variable MOF_COPIES
names a disk with room for the whole folder; by default it is ~/.cache.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from encoders.progress import tracked

COPIES = "mof-vig-copies"
TEMPORARY = ".tmp-"  # the beginning of the names of unfinished files
LOCKS = "*lock-[0-9][0-9][0-9][0-9]"  # earlier releases put no underscore before the name
TRANSFERS = 8
"""Files that are fetched side by side."""
SHOWN = 2**26
"""A bar shows the progress of fetching at least this number of bytes."""
URL = re.compile(r"([A-Za-z][\w+.-]+):/+(.*)")
"""A URL, also if it was a `Path`, which keeps only one of its two slashes."""

HELD: dict[Path, Callable[[], None]] = {}
"""For each folder that this process has locked, the function that raises an error after another run took the lock over."""


class StoredPath(type(Path())):  # type: ignore[misc]
    """A StoredPath is the path of a file or folder in a copy. In f-strings, and so in messages, it is shown as the URL."""

    def __format__(self, specification: str) -> str:
        return format(url_of(self) or str(self), specification)


def located(path: str | os.PathLike[str]) -> Path:
    """Return where to work for a path or URL: the path itself, or for a URL the path of its copy, which may not be there yet.

    Raises:
        ValueError: for a URL with "..".
    """
    match = URL.match(os.fspath(path))
    if match is None:
        return StoredPath(path) if url_of(Path(path)) else Path(path)
    if match[1] in ("file", "local"):
        return Path("/", match[2])
    parts = [part for part in match[2].split("/") if part]
    if ".." in parts or not parts:
        raise ValueError(f"{path}: expected a URL such as s3://bucket/folder, without '..'")
    return StoredPath(os.environ.get("MOF_COPIES") or Path.home() / ".cache", COPIES, match[1], *parts).absolute()


def url_of(path: Path) -> str | None:
    """Return the URL of a file or folder in a copy, None for other paths."""
    folders = path.parts[:-1]
    if COPIES not in folders:
        return None
    above = folders[::-1].index(COPIES)  # the last, because MOF_COPIES may end like this, too
    protocol, *rest = path.parts[len(folders) - above :]
    return f"{protocol}://{'/'.join(rest)}"


def fetched(path: str | os.PathLike[str], *, again: bool = False) -> Path:
    """Return `located(path)`, after making a copy equal to the storage: changed files are downloaded, files that are gone deleted.

    Args:
        again: download all files, also those that have not changed.

    Raises:
        ValueError: for a URL whose storage needs a library that is not installed.
        OSError: for storage that cannot be reached; the message says what to check.
    """
    copy = located(path)
    if (url := url_of(copy)) is None:
        return copy
    copies = next(folder for folder in copy.parents if folder.name == COPIES)
    place = Path(copies, f"{sha256(url.encode()).hexdigest()[:16]}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place), reached(url) as (storage, root):
        # The copy is listed first: other processes upload a file before they put it into the copy, so each file here was also there.
        here = {file for file in (copy, *copy.rglob("*")) if file.is_file() and not _passing(file)}
        found = storage.find(root, detail=True).items()
        found = ((name, info) for name, info in found if ".." not in name.split("/") and not name.endswith("/"))  # objects for folders
        there = {copy / name.removeprefix(root).strip("/"): info for name, info in found}
        there = {file: info for file, info in there.items() if info["type"] == "file" and not _passing(file)}
        for file in here - there.keys():
            file.unlink(missing_ok=True)
        wanted = {file: info for file, info in there.items() if again or file not in here or _state(file) != _state_of(info)}
        size = sum(info["size"] for info in wanted.values())
        with ThreadPoolExecutor(TRANSFERS) as pool:
            fetches = pool.map(partial(_fetch, storage), wanted, wanted.values())
            for _ in tracked(fetches, "files fetched", len(wanted), shown=size >= SHOWN):
                pass
    return copy


def upload(file: Path, path: Path) -> None:
    """Upload `file` as the file that `path` names, if that is in a copy. Most storage replaces an object in a single step.

    Raises:
        ValueError: after another run has taken over the lock of this process on the folder.
    """
    if url := url_of(path):
        confirm(path)
        with reached(url) as (storage, key):
            storage.put_file(str(file), key)
            _, seconds = _state_of(storage.info(key))
        os.utime(file, (seconds, seconds))


def remove(path: Path) -> None:
    """Delete a file or folder, which may be missing; in a copy, also from the storage."""
    if url := url_of(path):
        confirm(path)
        with reached(url) as (storage, key), suppress(FileNotFoundError), ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(storage.rm_file, storage.find(key)))  # `rm` would take brackets in a name for a pattern
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def confirm(path: Path) -> None:
    """Check that this process still holds the lock that it had taken on the folder of a file in a copy."""
    for folder, check in tuple(HELD.items()):
        if folder in path.parents:
            check()


@contextmanager
def reached(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the storage of a URL and the URL's name in it.

    Raises:
        ValueError: for storage that fsspec does not know, or whose library is not installed.
        OSError: in place of any other error of the storage; the message says what to check.
    """
    import fsspec  # slow

    try:
        storage, key = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:  # it names the library, or the protocols that it knows
        advice = '; pip install "mof-vig[s3]"' if url.startswith("s3:") else ""
        raise ValueError(f"{url}: {error}{advice}") from error
    try:
        yield storage, key
    except Exception as error:
        if isinstance(error, ValueError) or (isinstance(error, OSError) and error.filename is not None):  # ours, or of a file in the copy
            raise
        raise OSError(
            f"{url} cannot be reached ({type(error).__name__}: {error}). The bucket must exist. Credentials and another address come from "
            "the environment; for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, on all machines of a run"
        ) from error


def _fetch(storage: Any, file: Path, info: Mapping[str, Any]) -> None:
    temporary = file.with_name(f"{TEMPORARY}fetch-{file.name}")
    file.parent.mkdir(parents=True, exist_ok=True)
    storage.get_file(info["name"], str(temporary))
    os.utime(temporary, (_state_of(info)[1],) * 2)
    os.replace(temporary, file)


def _passing(file: Path) -> bool:
    """Return whether a file is a lock or unfinished, which stays on its machine."""
    return file.name.startswith(TEMPORARY) or file.suffix == ".lock" or file.match(LOCKS)


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, int(status.st_mtime)


def _state_of(info: Mapping[str, Any]) -> tuple[int, int]:
    """Return the size and the time that the copy of an object has. The time is no time: its 30 bits stand for the object's version.

    Storage that tells no version gets a random time, so that its files are always downloaded.
    """
    version = next((info[name] for name in ("ETag", "etag", "md5Hash", "mtime") if info.get(name)), os.urandom(8).hex())
    return info["size"], zlib.crc32(str(version).strip('"').encode()) // 4
