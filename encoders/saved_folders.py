"""Folders whose files other libraries write, such as saved models and checkpoints, hold a sealed list of the files' digests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from encoders.digests import DamagedError, checks, damaged, file_digest
from encoders.runs import read_sealed, write_sealed

DIGESTS = "digests.json"


@contextmanager
def recording(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Enter the files that are written into the folder while the context is open into its `digests.json`.

    Files that were there before keep their digests, so that their damage is not taken for granted.
    """
    path = Path(folder)
    before = _states(path)
    yield
    record(path, [name for name, state in _states(path).items() if before.get(name) != state])


def record(folder: Path, names: Sequence[str]) -> None:
    """Enter files of the folder, by their names in it, into its `digests.json`."""
    if names:
        known = read_sealed(folder / DIGESTS)["files"] if (folder / DIGESTS).is_file() else {}
        write_sealed(folder / DIGESTS, {"files": {**known, **{name: file_digest(folder / name) for name in sorted(names)}}})


def check_folder(folder: str | os.PathLike[str], without: str = "") -> None:
    """Raise a DamagedError naming the damaged files of a folder with a `digests.json`. Any other folder, or no folder, passes.

    Args:
        without: suffix of files that are not read.
    """
    path = Path(folder) / DIGESTS
    if checks() and path.is_file() and (lines := damaged(Path(folder), read_sealed(path)["files"], without)):
        raise DamagedError(f"{'; '.join(lines)}. Save the model again, or put back a copy; after changes of your own, delete {path}")


def _states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, time and size of each file of a folder, which may be missing."""
    files = [entry for entry in os.scandir(folder) if entry.is_file()] if folder.is_dir() else []
    states = {entry.name: entry.stat() for entry in files if entry.name != DIGESTS}
    return {name: (state.st_ino, state.st_mtime_ns, state.st_size) for name, state in states.items()}
