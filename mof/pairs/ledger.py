"""PairLedger searches in parts: the triangle of pairs is cut into squares, and the pairs of each square are stored in a whole file.

A search that was stopped goes on with the squares that have no file. The squares are compared in this process or by the actors of a
Ray cluster (`encoders.cluster`); files and result are the same.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.cluster import Cluster, GivenUp, worked
from encoders.digests import BLANK, DamagedError, check, seal
from encoders.runs import RunFile, RunLock, run_digest
from encoders.storage import fetched, remove
from encoders.whole_files import write_bytes
from mof.pairs.choice import BestPairs
from mof.pairs.comparison import PairComparison, pair_progress, pairs_in
from mof.pairs.sieve import tiles

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the folder."""
FEW, MANY = 16, 64
"""Largest number of squares along a side of the triangle: `FEW` squares of up to `LARGE` images, else `MANY`; then there are 2,000."""
SMALL, LARGE = 256, 8192
"""Images along a side of a square: enough to keep a processor busy for some hundredths of a second."""


@dataclass(frozen=True)
class Square:
    """A square holds the pairs with i in `rows` and j in `columns`, on or above the diagonal."""

    rows: slice
    columns: slice

    @property
    def name(self) -> str:
        return f"{self.rows.start}-{self.columns.start}"

    def halves(self) -> list[Square]:
        return []


class PairLedger:
    """PairLedger keeps the finished squares of a search in `folder`, which is made if need be.

    Args:
        most: how many pairs of a square are kept, the best.
        cluster: compares the squares in place of this process. All its machines see the folder.

    Raises:
        ValueError: if the folder holds the ledger of a search of other embeddings, thresholds or sizes.
    """

    def __init__(self, folder: str | Path, comparison: PairComparison, most: int | None, cluster: Cluster | None = None) -> None:
        self._folder, self._comparison, self._most, self._cluster = fetched(folder).absolute(), comparison, most, cluster
        run = RunFile(self._folder / "ledger.json", "ledger of a pair search", FORMAT, "name another folder")
        before = run.read()["identity"] if run.path.is_file() else {}
        size = before.get("square") or square_size(comparison.images)  # earlier releases cut other squares
        every = range(comparison.images)
        self._squares = [Square(rows, columns) for rows, columns in tiles(every, every, size)]
        identity = {
            "clip": [rows.digest() for rows in comparison.clips],
            "dino": [rows.digest() for rows in comparison.dinos],
            "clip_above": comparison.above,
            "dino_below": comparison.below,
            "kept_per_square": most,
            "square": size,
        }
        self._run = run_digest(run.claim(identity)["identity"])

    def found(self, progress: bool = False) -> Iterator[tuple[NDArray, int]]:
        """Yield the same as `PairComparison.found`, square by square, once all squares are done."""
        with RunLock(self._folder), pair_progress(self._comparison.images, progress) as count:
            for claim in self._folder.glob("*.claim"):  # of earlier releases
                claim.unlink()
            todo = [square for square in self._squares if not self._is_done(square)]
            count(comparisons(self._squares) - comparisons(todo), 0)
            make = partial(SquareSearch, self._comparison, self._folder, self._run, self._most, moves=self._cluster is not None)
            with closing(worked(make, todo, self._cluster)) as work:
                for square, [(_, total)] in work:
                    if isinstance(total, GivenUp):
                        raise ValueError(f"the pairs of the images {square.name} cannot be compared: {total.reason}")
                    count(comparisons([square]), total)
        fetched(self._folder)  # squares that actors on other machines wrote
        for square in self._squares:
            yield self._read(square)

    def _is_done(self, square: Square) -> bool:
        """Return whether the square's pairs are stored. A damaged file, or another square's or search's, is deleted."""
        path = _result(self._folder, square)
        try:
            return path.exists() and self._read(square) is not None
        except DamagedError as error:
            logger.warning("%s; the square is compared again", error)
            remove(path)
            return False

    def _read(self, square: Square) -> tuple[NDArray, int]:
        """Return the pairs of a square that is done, and how many it has. DamagedError for a file that is not the square's."""
        path = _result(self._folder, square)
        try:
            content = path.read_bytes()
            check(content, path)
            with np.load(io.BytesIO(content)) as stored:
                run, name = str(stored.get("run", self._run)), str(stored.get("square", square.name))  # earlier releases wrote neither
                pairs, total = stored["pairs"], int(stored["total"])
        except DamagedError:
            raise
        except Exception as error:  # zipfile and numpy raise many kinds for bad bytes
            raise DamagedError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
        if (run, name) != (self._run, square.name):
            raise DamagedError(f"{path} holds the square {name} of {'this' if run == self._run else 'another'} search")
        return pairs, total


class SquareSearch:
    """SquareSearch is the function that compares a square and stores its pairs. It returns their number.

    Args:
        moves: whether the embeddings move to the GPU of this process, if it has a GPU.
    """

    def __init__(self, comparison: PairComparison, folder: Path, run: str, most: int | None, *, moves: bool) -> None:
        self._comparison = comparison.moved("cuda") if moves and torch.cuda.is_available() else comparison
        self._folder, self._run, self._most = folder, run, most

    def __call__(self, square: Square) -> int:
        best = BestPairs(self._most)
        rows, columns = (range(side.start, side.stop) for side in (square.rows, square.columns))
        with torch.autocast(self._comparison.device.type, enabled=False):
            for pairs, total in self._comparison.within(rows, columns, lambda *_: None):
                best.add(pairs, total)
        buffer = io.BytesIO()
        np.savez(buffer, pairs=best.ranked(), total=best.total, run=self._run, square=square.name)
        with ZipFile(buffer, "a") as archive:
            archive.comment = BLANK.encode()
        write_bytes(_result(self._folder, square), seal(buffer.getvalue()))
        return best.total


def comparisons(squares: list[Square]) -> int:
    """Return how many pairs the squares hold."""
    return sum(pairs_in(square.rows, square.columns) for square in squares)


def square_size(images: int) -> int:
    """Return the number of images along a side of a square: whole 32s, as in tiles, which may differ from machine to machine."""
    size = max(SMALL, min(LARGE, images / FEW), images / MANY)
    return int(-(-size // 32)) * 32


def _result(folder: Path, square: Square) -> Path:
    return folder / f"{square.name}.npz"
