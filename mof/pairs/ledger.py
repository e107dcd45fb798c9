"""A search that any number of processes and machines share, which see one folder and do not talk to each other.

The triangle of pairs is cut into squares. A process claims a square by creating a file, and stores the square's pairs in a file that
appears whole. The claim of a dead process is taken over: at once if it ran on the same machine, otherwise when the claim has not
been renewed for TIMEOUT seconds. A claim only saves work: two processes with the same square store the same result.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from encoders.runs import RunFile, write_text, write_whole
from mof.pairs.choice import BestPairs
from mof.pairs.comparison import PairComparison, PairProgress, pairs_in
from mof.pairs.sieve import tiles

FORMAT = 1
"""Version of the folder."""
SQUARES = 64
"""At most so many squares along a side, about 2,000 in the triangle."""
SMALLEST = 8192
"""Images along a side of a square, at least: enough to keep a processor busy for some hundredths of a second."""
TIMEOUT = 120.0
"""Seconds after which a claim that is not renewed is void."""
RENEWAL = 10.0
"""Seconds between renewals of a claim."""
POLL = 0.5
"""Seconds between looks at the squares of other processes."""
HOST = socket.gethostname()


class PairLedger:
    """The ledger of one search in `folder`, which is made if need be.

    Raises:
        ValueError: if the folder holds the ledger of a search of other embeddings, thresholds or sizes.
    """

    def __init__(self, folder: str | Path, comparison: PairComparison, most: int | None) -> None:
        self._folder, self._comparison, self._most = Path(folder), comparison, most
        self._seen: dict[Path, tuple[float, int]] = {}
        # Independent of the tiles, which may differ from machine to machine; whole 32s, as the tiles are.
        size = max(SMALLEST, -(-comparison.images // (SQUARES * 32)) * 32)
        self._squares = {f"{r.start}-{c.start}": (r, c) for r, c in tiles(range(comparison.images), range(comparison.images), size)}
        identity = {
            "clip": [rows.digest() for rows in comparison.clips],
            "dino": [rows.digest() for rows in comparison.dinos],
            "clip_above": comparison.above,
            "dino_below": comparison.below,
            "kept_per_square": most,
            "square": size,
        }
        run = RunFile(self._folder / "ledger.json", "ledger of a pair search", FORMAT, "name another folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / "ledger.lock"):  # two searches that start together must not both find the folder empty
            if run.path.is_file() and (text := run.path.read_text(encoding="utf-8")).startswith('{\n "clip": ['):
                run.write(json.loads(text))  # earlier releases wrote the identity alone
            run.claim(identity, own=["*"])

    def found(self, progress: bool = False) -> Iterator[tuple[NDArray, int]]:
        """Yield what `PairComparison.found` yields, square by square, once all squares are done, by this process or by others."""
        with PairProgress(self._comparison.images, progress) as bar:
            self._work(bar)
        for name in self._squares:
            with np.load(self._result(name)) as stored:
                yield stored["pairs"], int(stored["total"])

    def _work(self, bar: PairProgress) -> None:
        """Compare squares, or wait for other processes, until every square is done."""
        names = list(self._squares)
        first = os.getpid() % max(len(names), 1)  # so that processes begin with different squares
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
        """Store the pairs of a claimed square."""
        best, renewed = BestPairs(self._most), time.monotonic()

        def advance(compared: int, found: int) -> None:
            nonlocal renewed
            bar.add(compared, found)
            if time.monotonic() - renewed > RENEWAL:
                write_text(self._claim_file(name), _owner())
                renewed = time.monotonic()

        rows, columns = self._squares[name]
        for pairs, total in self._comparison.within(range(rows.start, rows.stop), range(columns.start, columns.stop), advance):
            best.add(pairs, total)
        write_whole(self._result(name), lambda temporary: np.savez(temporary, pairs=best.ranked(), total=best.total))
        self._claim_file(name).unlink(missing_ok=True)

    def _claim(self, name: str) -> bool:
        """Return whether the square is this process's to do."""
        claim = self._claim_file(name)
        try:
            with claim.open("x") as file:
                file.write(_owner())
            return True
        except FileExistsError:
            if not self._is_void(claim):
                return False
        write_text(claim, _owner())
        return True

    def _is_void(self, claim: Path) -> bool:
        """Return whether nobody works on the square any more. Our own clock measures ages, by when we saw a claim change."""
        try:
            owner, changed = claim.read_text(), claim.stat().st_mtime_ns
        except FileNotFoundError:
            return False  # just done: the next look finds the result
        since, before = self._seen.get(claim, (0.0, -1))
        if changed != before:
            since = time.monotonic()
            self._seen[claim] = (since, changed)
        host, _, process = owner.rpartition(" ")
        return owner == _owner() or (host == HOST and not _runs(int(process))) or time.monotonic() - since > TIMEOUT

    def _result(self, name: str) -> Path:
        return self._folder / f"{name}.npz"

    def _claim_file(self, name: str) -> Path:
        return self._folder / f"{name}.claim"


def _owner() -> str:
    return f"{HOST} {os.getpid()}"


def _runs(process: int) -> bool:
    """Return whether a process of this machine is alive; also True where we cannot tell."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
