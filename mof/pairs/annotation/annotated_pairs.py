"""AnnotatedPairs finds the annotation of the journal that belongs to each pair of the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import RLock

from encoders import ImageError, read_image
from encoders.digests import file_digest
from encoders.text_files import parse_json, read_utf8
from mof.evals.patterns import PATTERNS
from mof.pairs.annotation.annotation import Annotation, State
from mof.pairs.annotation.journal import JOURNAL, Images, Journal, Saved
from mof.pairs.pair_table import PairTable


class AnnotatedPairs:
    """AnnotatedPairs holds the pairs of a folder, by number, and their newest annotations. Threads may share it.

    The content of an image is read when its pair is asked for. The content of all images is read only if the journal has annotations
    of pairs that are not found by name: after photos were moved or renamed, or pairs mined again.

    Args:
        folder: a folder that `mof blind-pairs` wrote; annotations go into `annotations.jsonl` in it.
        ticked: a file of pairs that the gallery wrote; the other pairs of the folder are left out.

    Raises:
        ValueError: for a folder without pairs, annotations that cannot be read, or a file `ticked` without pairs of the folder.
    """

    def __init__(self, folder: str | Path, ticked: str | Path | None = None) -> None:
        self.table = PairTable(folder)
        self.tags = {} if ticked is None else _read_ticked(Path(ticked))
        if ticked is not None:
            self.table.pairs = [pair for pair in self.table.pairs if pair.names in self.tags]
            if not self.table.pairs:
                raise ValueError(f"{ticked} names no pair of {folder}: expected a file that the gallery of this folder saved")
        self.journal = Journal(self.table.folder / JOURNAL)
        self._lock = RLock()
        self._digests: dict[Path, str | None] = {}
        self._by_name = {frozenset(pair.names): number for number, pair in enumerate(self.table.pairs)}
        self._by_content: dict[tuple[str, str], list[int]] | None = None
        self._states: list[State] = ["todo"] * len(self.table)
        self._counts = Counter(self._states)
        self._elsewhere: dict[tuple[str, str], tuple[tuple[str, str], State]] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self.table)

    def images(self, number: int) -> Images:
        """Return the images of a pair. IndexError for a number without a pair."""
        names = self.table.pairs[number].names
        first, second = (self._digest(self.table.image(number, side)) for side in (0, 1))
        return Images(names, None if first is None or second is None else (first, second))

    def saved(self, number: int) -> Saved:
        """Return the newest annotation of a pair."""
        return self.journal.get(self.images(number))

    def save(self, number: int, seen: int, annotation: Annotation) -> Saved:
        """Save the annotation of a pair; see `Journal.save`."""
        saved = self.journal.save(self.images(number), seen, annotation)
        self.refresh()
        return saved

    def refresh(self) -> None:
        """Take in the annotations that anybody has saved since."""
        with self._lock:
            for images, state in self.journal.news():
                numbers = self._numbers(images)
                for number in numbers:
                    self._counts[self._states[number]] -= 1
                    self._states[number] = state
                    self._counts[state] += 1
                if not numbers:
                    self._elsewhere[next(images.journal_keys())[0]] = images.names, state

    def count(self, state: State) -> int:
        """Return the number of pairs with this state."""
        return self._counts[state]

    def next_todo(self, start: int) -> int | None:
        """Return the first pair that is not done, from `start` on and then from the beginning; None if all are done."""
        for begin in (start, 0):
            try:
                return self._states.index("todo", begin)
            except ValueError:
                continue
        return None

    def elsewhere(self) -> list[tuple[str, str]]:
        """Return the names of the pairs that have complete annotations and are not in the table (any more)."""
        return [names for names, state in self._elsewhere.values() if state == "done"]

    def _numbers(self, images: Images) -> list[int]:
        """Return the pairs of the table that an annotation of these images belongs to."""
        number = self._by_name.get(frozenset(images.names))
        if number is not None:
            here = self.images(number).digests
            if None in (images.digests, here) or set(images.digests or ()) == set(here or ()) or not self._readable(number):
                return [number]
        if images.digests is None:
            return []
        if self._by_content is None:
            self._by_content = {}
            for key, place in self._keys_by_content():
                self._by_content.setdefault(key, []).append(place)
        return self._by_content.get(next(images.journal_keys())[0], [])

    def _readable(self, number: int) -> bool:
        """Return whether both images of a pair can be read. The content of unreadable images tells nothing: they may be damaged."""
        damaged = []
        for file in (self.table.image(number, side) for side in (0, 1)):
            try:
                read_image(file)
            except ImageError:
                damaged.append(file)
        self._digests |= dict.fromkeys(damaged)
        return not damaged

    def _keys_by_content(self) -> Iterator[tuple[tuple[str, str], int]]:
        files = {self.table.image(number, side) for number in range(len(self)) for side in (0, 1)}
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._digest, files))
        for number in range(len(self)):
            if (images := self.images(number)).digests is not None:
                yield next(images.journal_keys())[0], number

    def _digest(self, file: Path) -> str | None:
        if file not in self._digests:
            try:
                self._digests[file] = file_digest(file)
            except OSError:
                self._digests[file] = None
        return self._digests[file]


def _read_ticked(file: Path) -> dict[tuple[str, str], str | None]:
    """Return the names of the pairs, and the pattern with which each was tagged, or None."""
    try:
        rows = parse_json(read_utf8(file), file)
        return {(row["image_i"], row["image_j"]): row["pattern"] if row["pattern"] in PATTERNS else None for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file}: expected ticked pairs that a gallery saved, a JSON list of image_i, image_j and pattern ({error})"
        ) from None
