"""A search shared by any number of processes and machines that see one folder and do not talk to each other.

The triangle of pairs is cut into squares. A process claims a square by creating a file, and stores what it finds under the name
of the square, which appears at once and whole. The claim of a process that died is taken over: at once where that can be seen (the
same machine), else when the claim has not been renewed for TIMEOUT seconds. A claim only saves work: two processes with the same
square store the same result.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mof.pairs.choice import BestPairs
from mof.pairs.search import PairProgress, PairSearch, pairs_in
from mof.pairs.sieve import tiles

SQUARES = 64
"""At most so many squares along a side, about 2,000 in the triangle."""
SMALLEST = 8192
"""Images along a side of a square, at least: enough to keep a processor busy for some hundredths of a second."""
TIMEOUT = 120.0
"""Seconds after which a claim that is not renewed is void."""
RENEWAL = 10.0
"""Seconds between renewals of a claim."""
POLL = 0.5
"""Seconds between looks at what others are still doing."""
HOST = socket.gethostname()


class PairLedger:
    """The ledger of one search in `folder`, which is made if need be.

    Raises:
        ValueError: if the folder holds the ledger of a search of other embeddings, thresholds or sizes.
    """

    def __init__(self, folder: str | Path, search: PairSearch, most: int | None) -> None:
        self._folder, self._search, self._most = Path(folder), search, most
        self._seen: dict[Path, tuple[float, int]] = {}
        # Whatever the tiles, which may differ from machine to machine; whole 32s, as they are.
        size = max(SMALLEST, -(-search.images // (SQUARES * 32)) * 32)
        self._squares = {f"{r.start}-{c.start}": (r, c) for r, c in tiles(range(search.images), range(search.images), size)}
        identity = {
            "clip": [one.digest() for one in search.clips],
            "dino": [one.digest() for one in search.dinos],
            "clip_above": search.above,
            "dino_below": search.below,
            "kept_per_square": most,
            "square": size,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sign(identity)

    def found(self, progress: bool = False) -> Iterator[tuple[NDArray, int]]:
        """As `PairSearch.found`, one square after the other, once all are done: by this process or by others."""
        with PairProgress(self._search.images, progress) as bar:
            self._work(bar)
        for name in self._squares:
            with np.load(self._result(name)) as stored:
                yield stored["pairs"], int(stored["total"])

    def _work(self, bar: PairProgress) -> None:
        """Until every square is done."""
        names = list(self._squares)
        first = os.getpid() % max(len(names), 1)  # so that not all begin with the same square
        left = names[first:] + names[:first]
        while left:
            for name in left.copy():
                if self._result(name).exists():
                    bar.add(pairs_in(*self._squares[name]), 0)
                elif self._claim(name):
                    self._compare(name, bar)
                else:
                    continue
                left.remove(name)
            if left:
                time.sleep(POLL)

    def _compare(self, name: str, bar: PairProgress) -> None:
        best, renewed = BestPairs(self._most), time.monotonic()

        def advance(compared: int, found: int) -> None:
            nonlocal renewed
            bar.add(compared, found)
            if time.monotonic() - renewed > RENEWAL:
                self._write(self._claims(name), lambda file: file.write(_owner()))
                renewed = time.monotonic()

        rows, columns = self._squares[name]
        for pairs, total in self._search.within(range(rows.start, rows.stop), range(columns.start, columns.stop), advance):
            best.add(pairs, total)
        self._write(self._result(name), lambda file: np.savez(file, pairs=best.ranked(), total=best.total))
        self._claims(name).unlink(missing_ok=True)

    def _claim(self, name: str) -> bool:
        """Whether the square is ours to do."""
        claim = self._claims(name)
        if _create(claim, _owner()):
            return True
        if not self._is_void(claim):
            return False
        self._write(claim, lambda file: file.write(_owner()))
        return True

    def _is_void(self, claim: Path) -> bool:
        """Whether nobody works on it any more. Ages are measured on our own clock, by when we saw a claim change."""
        try:
            owner, changed = claim.read_bytes(), claim.stat().st_mtime_ns
        except FileNotFoundError:
            return False  # just done: the next look finds the result
        since, before = self._seen.get(claim, (0.0, -1))
        if changed != before:
            since = time.monotonic()
            self._seen[claim] = (since, changed)
        host, _, process = owner.decode().rpartition(" ")
        return owner == _owner() or (host == HOST and not _runs(int(process))) or time.monotonic() - since > TIMEOUT

    def _sign(self, identity: dict[str, Any]) -> None:
        path, text = self._folder / "ledger.json", json.dumps(identity, indent=1)
        if _create(path, text.encode()):
            return
        for _ in range(50):  # who created it may not have written it yet
            if path.stat().st_size:
                break
            time.sleep(0.1)
        try:
            signed = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path} is not a ledger: delete the folder, or name another one") from None
        other = [key for key, value in identity.items() if signed.get(key) != value]
        if other:
            raise ValueError(f"{self._folder} is the ledger of another search ({', '.join(other)} differ): name another folder")

    def _write(self, path: Path, write: Callable[[BinaryIO], Any]) -> None:
        """Whole or not at all."""
        temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}")
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave the name without the bytes
        os.replace(temporary, path)

    def _result(self, name: str) -> Path:
        return self._folder / f"{name}.npz"

    def _claims(self, name: str) -> Path:
        return self._folder / f"{name}.claim"


def _owner() -> bytes:
    return f"{HOST} {os.getpid()}".encode()


def _create(path: Path, content: bytes) -> bool:
    """Whether the file was not there, and is now."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _runs(process: int) -> bool:
    """Whether a process of this machine is alive; where we cannot tell, it is."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


__all__ = ["PairLedger"]
