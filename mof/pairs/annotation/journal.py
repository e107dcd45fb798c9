"""The journal keeps all annotations of a folder on disk.

It has one line of JSON for every annotation that was ever saved, so nothing is written over. Any number of pages and servers may work
on one file. A line holds the names of a pair's images and the digests of their content. The digests find the pair again after
photos were moved or renamed, sides swapped or pairs mined again. Lines of earlier releases hold names only. Each pair has a revision,
the number of its lines. A page names the revision that it has seen when it saves. If there is a newer revision, it is refused.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from encoders.digests import MARK, open_json, seal_json
from mof.pairs.annotation.annotation import Annotation, State

JOURNAL = "annotations.jsonl"
FORMAT, OLD_FORMAT = 2, 1
"""Versions of a line that are read: lines of format 1 have no digests, and the first releases wrote no format."""


@dataclass(frozen=True)
class Images:
    """Images holds the two images of a pair, in an order."""

    names: tuple[str, str]
    digests: tuple[str, str] | None
    """Digests of the files' content; None if a file cannot be read."""

    def journal_keys(self) -> Iterator[tuple[tuple[str, str], bool]]:
        """Yield the keys of the pair in the journal, and whether the sides of an annotation under the key are swapped."""
        if self.digests is not None:
            first, second = self.digests
            yield (min(first, second), max(first, second)), first > second
        yield self.names, False
        yield self.names[::-1], True


@dataclass(frozen=True)
class Saved:
    """Saved holds the newest annotation of a pair."""

    revision: int = 0
    """0 before anything was saved."""
    annotation: Annotation = field(default_factory=Annotation)


class ConflictError(Exception):
    """A ConflictError says that somebody else has saved in between; `current` is their annotation."""

    def __init__(self, current: Saved) -> None:
        super().__init__("this pair was changed elsewhere")
        self.current = current


class Journal:
    """Journal is the file of annotations.

    Raises:
        ValueError: for a line that is no annotation. An incomplete last line was never confirmed, and is dropped.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._lock = FileLock(f"{self.file}.lock", poll_interval=0.005)  # between threads, too
        self._saved: dict[tuple[str, str], Saved] = {}
        self._keys: dict[tuple[str, str], tuple[tuple[str, str], bool]] = {}
        self._news: list[tuple[Images, State]] = []
        self._read = 0  # bytes
        self._line = 0

    def news(self) -> list[tuple[Images, State]]:
        """Return the pair and the state of each line that this object, or anybody else, has added since the last call, in order."""
        with self._locked():
            news, self._news = self._news, []
            return news

    def get(self, images: Images) -> Saved:
        """Return the newest annotation of a pair, with the sides in the order of its images."""
        with self._locked():
            return self._find(images)

    def _find(self, images: Images) -> Saved:
        keys = list(images.journal_keys())
        if images.digests is None:  # cannot be read now, but could when a line was written
            keys += [(key, swap != line_swap) for names, swap in keys if names in self._keys for key, line_swap in [self._keys[names]]]
        for key, swap in keys:
            if (saved := self._saved.get(key)) is not None:
                return dataclasses.replace(saved, annotation=saved.annotation.swapped()) if swap else saved
        return Saved()

    def save(self, images: Images, seen: int, annotation: Annotation) -> Saved:
        """Append a line, unless the pair's newest line says the same; the line is on disk when this returns.

        Args:
            seen: the revision that the annotation was made from.

        Raises:
            ConflictError: when there is a newer revision that says something else.
        """
        with self._locked():
            current = self._find(images)
            if annotation == current.annotation:
                return current
            if current.revision != seen:
                raise ConflictError(current)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            entry = {"format": FORMAT, "image_i": images.names[0], "image_j": images.names[1], "digests": images.digests, "saved": now}
            line = seal_json(entry | dataclasses.asdict(annotation), indent=None) + b"\n"
            with self.file.open("ab") as stream:
                stream.truncate(self._read)  # an incomplete line
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            self._take(line)
            return self._find(images)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, after reading the lines that others have added."""
        with self._lock:
            size = self.file.stat().st_size if self.file.exists() else 0
            if size < self._read:
                raise ValueError(f"{self.file} was shortened by something else while it was in use: start again")
            if size > self._read:
                with self.file.open("rb") as stream:
                    stream.seek(self._read)
                    *lines, torn = stream.read().split(b"\n")
                    for line in lines:
                        self._take(line + b"\n")
                    if torn.count(MARK) > 1 and not b'"}'.startswith(torn.rpartition(MARK)[2]):  # a whole line is there, and more
                        raise ValueError(f"{self.file}: the end of its last line is damaged; end it with a line feed")
            yield

    def _take(self, line: bytes) -> None:
        self._line += 1
        try:
            entry = open_json(line[:-1], "this line")
            if (version := entry.pop("format", OLD_FORMAT)) not in (FORMAT, OLD_FORMAT):
                raise ValueError(f"its format is {version}, this version of mof-vig reads {FORMAT}")
            digests = entry.pop("digests", None)
            images = Images((entry.pop("image_i"), entry.pop("image_j")), digests and (digests[0], digests[1]))
            del entry["saved"]
            annotation = Annotation.from_json(entry)
            key, swap = next(images.journal_keys())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{self.file}, line {self._line}: no annotation ({error}); correct the line, or delete it") from None
        self._saved[key] = Saved(self._find(images).revision + 1, annotation.swapped() if swap else annotation)
        self._keys[images.names] = key, swap
        self._news.append((images, annotation.state))
        self._read += len(line)
