"""These functions load decoding methods, and pages that explain answers, from packages that name them by entry points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol


class Decoding(Protocol):
    """A decoding method has a text that names it with all options."""

    def options(self, chats: Sequence[Any], encode: Callable[[list[Any]], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the further arguments of `model.generate` for conversations, which `encode` turns into the model's inputs."""


def load_decoding(text: str | None) -> Decoding | None:
    """Return the method of a text NAME[:OPTION=VALUE...]; None for None.

    Raises:
        ValueError: for an unknown name or option, and if no installed package has decoding methods.
    """
    return None if text is None else _load("mof.decoding", f"decoding {text!r}")(text)


def load_explainer() -> Callable[..., None]:
    """Return the function that writes the page of `--explain`. ValueError if no installed package has it."""
    return _load("mof.explain", "--explain")


def _load(group: str, asked: str) -> Callable[..., Any]:
    """Return the object that the first entry point of a group names."""
    point = next(iter(entry_points(group=group)), None)
    if point is None:
        raise ValueError(f"{asked}: no installed package has this; install this one again: pip install -e .")
    return point.load()
