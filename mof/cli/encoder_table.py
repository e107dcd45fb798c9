"""`mof encode --list` prints this table. The presets' sizes lie in a file, because building 100 networks to measure them takes long."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

from rich.table import Table

from encoders import available_encoders
from encoders.console import Console
from encoders.presets import PRESETS, caveat
from encoders.terminal import say

COLUMNS = ("name", "width", "patch", "pixels", "tokens", "params (M)", "text", "licence of the weights")
SIZES = Path(__file__).with_name("encoder_sizes.json")
Sizes = tuple[int, int, int, int, float, bool]
"""Width, patch size, image size, number of patch tokens, million parameters, and whether it has a text tower."""


def print_encoders(pattern: str | None = None, text_tower: bool | None = None, licence: str | None = None) -> None:
    """Print the sizes of each encoder, for the layer that it gives by default and its native image size, and its licence.

    Args:
        pattern: print only encoders whose names match this, such as "siglip*" (`fnmatch`). A text without wildcards matches anywhere.
        text_tower: print only encoders with a text tower (True) or without a text tower (False).
        licence: print only encoders whose licence matches this, as `pattern`.

    Raises:
        ValueError: if no encoder is left.
    """
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for column in table.columns[1:6]:
        column.justify = "right"
    sizes = json.loads(SIZES.read_text(encoding="utf-8"))
    known = [name for name in available_encoders() if _matches(name, pattern)]
    rows = {name: _row(sizes[name], PRESETS[name].licence) if name in PRESETS else _measured(name) for name in known}
    towers = {None: ("yes", "no", "-"), True: ("yes",), False: ("no",)}[text_tower]
    shown = [name for name, row in rows.items() if row[5] in towers and _matches(row[6], licence)]
    if not shown:
        raise ValueError("no encoder matches; `mof encode --list` alone prints all, and `--list 'clip*'` those whose names begin so")
    for name in shown:
        table.add_row(name, *rows[name])
    Console(width=120).print(table)
    if note := caveat(shown):
        say(note, err=True)  # so that the output is a table


def _matches(text: str, pattern: str | None) -> bool:
    if pattern is None:
        return True
    wildcard = any(mark in pattern for mark in "*?[")
    return fnmatch(text.lower(), pattern.lower() if wildcard else f"*{pattern.lower()}*")


def _measured(name: str) -> list[str]:
    """Return the row of an encoder of another package, or the reason why it cannot be built."""
    from mof.cli.encoder_sizes import measure  # slow: imports torch

    try:
        return _row(measure(name), "see its package")
    except Exception as error:  # the other package may raise any error
        return ["-"] * 6 + [f"cannot be built: {error}"]


def _row(sizes: Sizes, licence: str) -> list[str]:
    *numbers, has_text = sizes
    return [*map(str, numbers), "yes" if has_text else "no", licence]
