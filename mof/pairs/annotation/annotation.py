"""An annotation is a person's description of a pair of images."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from mof.data.forms import whole_characters
from mof.evals.benchmark_folders import options_problem
from mof.evals.patterns import PATTERNS

LONGEST = 2000  # characters of a field
State = Literal["todo", "done", "skipped", "flagged"]
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Annotation:
    """An annotation holds the fields that are filled so far. The first of two values belongs to the left image, the pair's `image_i`."""

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
        """Return the annotation of a JSON object. White space in its texts becomes single spaces, and half a surrogate becomes U+FFFD.

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

    def swapped(self) -> Annotation:
        """Return the annotation of the same pair with its sides swapped."""
        return dataclasses.replace(self, statements=self.statements[::-1], right=self.right[::-1])

    def missing(self) -> list[str]:
        """Return the names of the fields that a benchmark still needs; the list is empty for a complete annotation."""
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


def _check(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} should be one of {', '.join(map(str, allowed))}, got {str(value)[:200]}")


def _plain(text: Any) -> str:
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError(f"expected a text of at most {LONGEST} characters, got {str(text)[:200]}")
    return " ".join(_CONTROL.sub(" ", whole_characters(text)).split())
