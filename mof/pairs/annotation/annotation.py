"""Annotations: a person's description of a pair, and the journal that keeps all of them on disk.

The journal has one line of JSON for every annotation that was ever saved, so nothing is written over. Any number of pages and servers
may work on one file. Each pair has a revision, the number of its lines. A page that saves names the revision it has seen, and is
refused if there is a newer one.
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
from typing import Any, Literal

from filelock import FileLock

from mof.evals.benchmark_folders import options_problem
from mof.evals.patterns import PATTERNS

JOURNAL = "annotations.jsonl"
FORMAT = 1
"""Version of a line of the journal. Lines of earlier releases have none."""
LONGEST = 2000  # characters of a field
State = Literal["todo", "done", "skipped", "flagged"]
Names = tuple[str, str]


@dataclass(frozen=True)
class Annotation:
    """Fields as far as they are filled; the first of two belongs to the left image, the pair's `image_i`."""

    pattern: str | None = None
    """One of `mof.evals.patterns.PATTERNS`."""
    statements: tuple[str, str] = ("", "")
    question: str = ""
    options: tuple[str, str] = ("", "")
    right: tuple[str | None, str | None] = (None, None)
    """The letter of each image's right option, "a" or "b"."""
    mark: Literal["skipped", "flagged"] | None = None
    """"skipped": nothing to ask here. "flagged": somebody should look again. Neither is exported."""

    @classmethod
    def from_json(cls, given: Any) -> Annotation:
        """Return the annotation of a JSON object. White space in its texts becomes single spaces.

        Raises:
            ValueError: for anything else, naming the field.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(given, dict) or set(given) != names:
            raise ValueError(f"expected an object of {', '.join(sorted(names))}, got {str(given)[:200]}")
        _check("pattern", given["pattern"], (None, *PATTERNS))
        _check("mark", given["mark"], (None, "skipped", "flagged"))
        for name in ("statements", "options", "right"):
            if not isinstance(given[name], list) or len(given[name]) != 2:
                raise ValueError(f"{name} should be a list of two, got {str(given[name])[:200]}")
        for letter in given["right"]:
            _check("right", letter, (None, "a", "b"))
        (first, second), (a, b) = given["statements"], given["options"]
        first, second, question, a, b = (_plain(text) for text in (first, second, given["question"], a, b))
        return cls(given["pattern"], (first, second), question, (a, b), (given["right"][0], given["right"][1]), given["mark"])

    def missing(self) -> list[str]:
        """Return in words what a benchmark still needs; the list is empty for a complete annotation."""
        lacks = [] if self.pattern else ["pattern"]
        lacks += [f"{side} statement" for side, text in zip(("left", "right"), self.statements, strict=True) if not text]
        if all(self.statements) and self.statements[0].casefold() == self.statements[1].casefold():
            lacks.append("statements that differ")
        lacks += [] if self.question else ["question"]
        lacks += [f"option ({letter})" for letter, text in zip("ab", self.options, strict=True) if not text]
        if all(self.options) and options_problem(self.options):
            lacks.append("options that can be told apart")
        if None in self.right:
            lacks.append("right option of each image")
        elif self.right[0] == self.right[1]:
            lacks.append("right options that differ")
        return lacks

    @property
    def state(self) -> State:
        return self.mark or ("todo" if self.missing() else "done")


@dataclass(frozen=True)
class Saved:
    """The newest annotation of a pair."""

    revision: int = 0
    """0 before anything was saved."""
    annotation: Annotation = field(default_factory=Annotation)


class ConflictError(Exception):
    """Somebody else saved in between; holds what they saved."""

    def __init__(self, current: Saved) -> None:
        super().__init__("this pair was changed elsewhere")
        self.current = current


class Journal:
    """The file of annotations, read by the names of a pair's images.

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
        """Return the newest annotation of every pair that has any, with what others have saved until now."""
        with self._locked():
            return dict(self._saved)

    def get(self, names: Names) -> Saved:
        """Return the newest annotation of a pair."""
        return self.all().get(names, Saved())

    def save(self, names: Names, seen: int, annotation: Annotation) -> Saved:
        """Append a line, unless the pair's newest line says the same; the line is on disk when this returns.

        Args:
            seen: the revision that the annotation was made from.

        Raises:
            ConflictError: when there is a newer revision that says something else.
        """
        with self._locked():
            current = self._saved.get(names, Saved())
            if annotation == current.annotation:
                return current
            if current.revision != seen:
                raise ConflictError(current)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            entry = {"format": FORMAT, "image_i": names[0], "image_j": names[1], "saved": now}
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
        """Hold the lock, after reading the lines that others have added."""
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
            version = entry.pop("format", FORMAT)
            names = entry.pop("image_i"), entry.pop("image_j")
            del entry["saved"]
            if version != FORMAT:
                raise ValueError(f"its format is {version}, this version of mof-vig reads {FORMAT}")
            annotation = Annotation.from_json(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.file}, line {self._line}: no annotation ({error}); correct the line, or delete it") from None
        self._saved[names] = Saved(self._saved.get(names, Saved()).revision + 1, annotation)
        self._read += len(line)


def _check(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} should be one of {', '.join(map(str, allowed))}, got {str(value)[:200]}")


def _plain(text: Any) -> str:
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError(f"expected a text of at most {LONGEST} characters, got {str(text)[:200]}")
    return " ".join(text.split())
