"""One run at a time in a folder, of as many processes as it has."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

LOCKS = "lock-*"


class RunLock:
    """Each process holds a lock file of its own; the operating system frees it when the process dies, in whatever way.

    The first process takes its lock before the others and looks whether all others are free: of a run that was killed in
    part, some processes may live on for a while.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._own = FileLock(folder / f"lock-{rank:04d}")

    def take(self) -> None:
        """By the first process, then by the others. ValueError while a process of another run holds one."""
        self._take(self._own)
        for path in self._folder.glob(LOCKS) if self._rank == 0 else ():
            if path != Path(self._own.lock_file):
                other = FileLock(path)
                self._take(other)
                other.release()

    def release(self) -> None:
        self._own.release(force=True)

    def _take(self, lock: FileLock) -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run is writing to {self._folder} and still alive; wait for it or end it, then run this again to go on "
                "with what it saved, or give another folder"
            ) from None
