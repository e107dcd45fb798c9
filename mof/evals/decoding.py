"""Decoding methods by name. Packages that have them make themselves known by the entry point `mof.decoding`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any, Protocol

import typer

DecodingName = Annotated[
    str | None,
    typer.Option(
        "--decoding", help="NAME[:OPTION=VALUE...]: vcd, icd, m3id, pai, var or lacing, such as vcd:alpha=0.5. Default: plain decoding."
    ),
]


class Decoding(Protocol):
    """A decoding method; its text names it with all options."""

    def options(self, chats: Sequence[Any], encode: Callable[[list[Any]], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the further arguments of `model.generate` for conversations, which `encode` turns into the model's inputs."""


def load_decoding(text: str | None) -> Decoding | None:
    """Return the method of a text NAME[:OPTION=VALUE...]; None for None.

    Raises:
        ValueError: for an unknown name or option, and if no installed package has decoding methods.
    """
    if text is None:
        return None
    point = next(iter(entry_points(group="mof.decoding")), None)
    if point is None:
        raise ValueError(f"decoding {text!r}: no installed package has decoding methods; install this one again: pip install -e .")
    return point.load()(text)
