"""A search that any number of processes and machines share, which see one folder and do not talk to each other.

The triangle of pairs is cut into squares. A process claims a square by creating a file, and stores the square's pairs in a file that
appears whole. The claim of a dead process is taken over: at once if it ran on the same machine, otherwise when the claim has not
been renewed for TIMEOUT seconds. A claim only saves work: two processes with the same square store the same result.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from encoders.digests import BLANK, DamagedError, check, seal
from encoders.runs import RunFile, run_digest, write_bytes, write_text
from mof.pairs.choice import BestPairs
from mof.pairs.comparison import Count, PairComparison, pair_progress, pairs_in
from mof.pairs.sieve import tiles

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the folder."""
SQUARES = 64
"""Largest number of squares along a side; the triangle then has about 2,000."""
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
            self._run = run_digest(run.claim(identity, own=["*"])["identity"])

    def found(self, progress: bool = False) -> Iterator[tuple[NDArray, int]]:
        """Yield what `PairComparison.found` yields, square by square, once all squares are done, by this process or by others."""
        with pair_progress(self._comparison.images, progress) as count:
            self._work(count)
        for name in self._squares:
            yield self._read(name)

    def _work(self, count: Count) -> None:
        """Compare squares, or wait for other processes, until every square is done."""
        names = list(self._squares)
        first = os.getpid() % max(len(names), 1)  # so that processes begin with different squares
        left = names[first:] + names[:first]
        while left:
            for name in left.copy():
                if self._is_done(name):
                    count(pairs_in(*self._squares[name]), 0)
                elif self._claim(name):
                    self._compare(name, count)
                else:
                    continue
                left.remove(name)
            if left:
                time.sleep(POLL)

    def _compare(self, name: str, count: Count) -> None:
        """Store the pairs of a claimed square."""
        best, renewed = BestPairs(self._most), time.monotonic()

        def renew(compared: int, found: int) -> None:
            nonlocal renewed
            count(compared, found)
            if time.monotonic() - renewed > RENEWAL:
                write_text(self._claim_file(name), _owner())
                renewed = time.monotonic()

        rows, columns = self._squares[name]
        for pairs, total in self._comparison.within(range(rows.start, rows.stop), range(columns.start, columns.stop), renew):
            best.add(pairs, total)
        buffer = io.BytesIO()
        np.savez(buffer, pairs=best.ranked(), total=best.total, run=self._run, square=name)
        with ZipFile(buffer, "a") as archive:
            archive.comment = BLANK.encode()
        write_bytes(self._result(name), seal(buffer.getvalue()))
        self._claim_file(name).unlink(missing_ok=True)

    def _is_done(self, name: str) -> bool:
        """Return whether the square's pairs are stored. A damaged file, or another square's or search's, is deleted."""
        try:
            return self._result(name).exists() and self._read(name) is not None
        except DamagedError as error:
            logger.warning("%s; the square is compared again", error)
            self._result(name).unlink(missing_ok=True)
            return False

    def _read(self, name: str) -> tuple[NDArray, int]:
        """Return the pairs of a square that is done, and their number. DamagedError for a file that is not the square's."""
        path = self._result(name)
        try:
            content = path.read_bytes()
            check(content, path)
            with np.load(io.BytesIO(content)) as stored:
                run, square = str(stored.get("run", self._run)), str(stored.get("square", name))  # earlier releases wrote neither
                pairs, total = stored["pairs"], int(stored["total"])
        except DamagedError:
            raise
        except Exception as error:  # zipfile and numpy raise many kinds for bad bytes
            raise DamagedError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
        if (run, square) != (self._run, name):
            raise DamagedError(f"{path} holds the square {square} of {'this' if run == self._run else 'another'} search")
        return pairs, total

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
        """Return whether nobody works on the square any more. Its age is the time since we saw it change."""
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
