"""Annotations on disk: one line of JSON for everything that was ever saved, so that nothing is written over.

Any number of pages and servers may work on one file. Each pair has a revision, the number of its lines; who saves says which
revision they have seen, and is refused if there is a newer one.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock

from mof.pairs.annotation.annotation import Annotation

Names = tuple[str, str]


@dataclass(frozen=True)
class Saved:
    """The newest line of a pair."""

    revision: int = 0
    """0 before anything was saved."""
    annotation: Annotation = field(default_factory=Annotation)


class ConflictError(Exception):
    """Somebody else saved in between; holds what they saved."""

    def __init__(self, current: Saved) -> None:
        super().__init__("this pair was changed elsewhere")
        self.current = current


class Journal:
    """The file, and what it says of each pair by the names of its images.

    Raises:
        ValueError: for a line that is no annotation. A torn last line was never confirmed, and is dropped.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._lock = FileLock(f"{self.file}.lock", poll_interval=0.005)  # between threads, too
        self._saved: dict[Names, Saved] = {}
        self._read = 0  # bytes
        self._line = 0

    def all(self) -> dict[Names, Saved]:
        """The newest of every pair that has any, with what others have saved until now."""
        with self._locked():
            return dict(self._saved)

    def get(self, names: Names) -> Saved:
        """The newest of one pair."""
        return self.all().get(names, Saved())

    def save(self, names: Names, seen: int, annotation: Annotation) -> Saved:
        """Append a line; it is on disk when this returns. What is saved already is not saved again.

        Args:
            seen: the revision that the annotation was made from.

        Raises:
            ConflictError: when there is a newer one that says something else.
        """
        with self._locked():
            current = self._saved.get(names, Saved())
            if annotation == current.annotation:
                return current
            if current.revision != seen:
                raise ConflictError(current)
            entry = {"image_i": names[0], "image_j": names[1], "saved": datetime.now(timezone.utc).isoformat(timespec="seconds")}
            line = json.dumps(entry | dataclasses.asdict(annotation)).encode() + b"\n"
            with self.file.open("ab") as stream:
                stream.truncate(self._read)  # a torn line
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            self._take(line)
            return self._saved[names]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """With everything read that is there."""
        with self._lock:
            size = self.file.stat().st_size if self.file.exists() else 0
            if size < self._read:
                raise ValueError(f"{self.file} was shortened by something else while it was in use: start again")
            if size > self._read:
                with self.file.open("rb") as stream:
                    stream.seek(self._read)
                    for line in stream.read().split(b"\n")[:-1]:
                        self._take(line + b"\n")
            yield

    def _take(self, line: bytes) -> None:
        self._line += 1
        try:
            entry = json.loads(line)
            names = entry.pop("image_i"), entry.pop("image_j")
            del entry["saved"]
            annotation = Annotation.from_json(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.file}, line {self._line}: no annotation ({error}); correct the line, or delete it") from None
        self._saved[names] = Saved(self._saved.get(names, Saved()).revision + 1, annotation)
        self._read += len(line)
