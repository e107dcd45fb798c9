"""Tables of `mof eval` for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.table import Table


def plain_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]], heading: str = "") -> Table:
    """Return a table with a row per name under `heading`, and right-aligned values under `columns`."""
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(heading, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def percent_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> Table:
    """Return a table of shares in [0, 1] as percentages."""
    shown = {name: ["-" if share is None else f"{100 * share:.1f}" for share in shares] for name, shares in rows.items()}
    return plain_table(title, [column.replace("_", " ") for column in columns], shown)
