"""TextTable makes tables for terminals and text files, and `show_result` prints what `mof eval` measured.

Lines break between words only, so a table that is too wide comes in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from encoders.console import Console


@dataclass(frozen=True)
class TextTable:
    """TextTable is a table with a row per name, for `Console.print`."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    """Name -> a text for each column; line ends stay."""
    heading: str = ""
    """The heading above the names."""

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the table, or a table for each part of the columns that fits beside the names."""
        longest = options.max_width // 2
        left = min(longest, max(map(len, [self.heading, *self.rows]), default=0))
        words = [max(map(_longest_word, column)) for column in self._by_column()]
        lines = [max(len(line) for text in column for line in text.splitlines() or [""]) for column in self._by_column()]
        widths = lines if left + sum(width + 2 for width in lines) + 3 <= options.max_width else words  # headings in several lines
        parts: list[list[int]] = [[]]
        for place in range(len(self.columns)):
            if parts[-1] and left + sum(widths[other] + 2 for other in [*parts[-1], place]) + 3 > options.max_width:
                parts.append([])
            parts[-1].append(place)
        for number, places in enumerate(parts):
            yield Text(f"{self.title} (continued)" if number else self.title, "italic")
            table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
            table.add_column(self.heading, width=left)
            for place in places:
                table.add_column(self.columns[place], justify="right", width=widths[place])
            for name, cells in self.rows.items():
                table.add_row(_shown(name, longest), *(cells[place] for place in places))
            yield table

    def _by_column(self) -> Iterator[tuple[str, ...]]:
        for place, column in enumerate(self.columns):
            yield column, *(cells[place] for cells in self.rows.values())


def percent_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> TextTable:
    """Return a table of shares in [0, 1] as percentages."""
    shown = {name: ["-" if share is None else f"{100 * share:.1f}" for share in shares] for name, shares in rows.items()}
    return TextTable(title, [column.replace("_", " ") for column in columns], shown)


def show_result(result: Mapping[str, Any], output: Path, *lines: RenderableType) -> None:
    """Print tables and lines, then the result's deviations and usage, and the folder that holds it."""
    console = Console()
    for line in (*lines, *(f"- {note}" for note in result["deviations"])):
        console.print(line)
    for name, usage in (("", result.get("usage")), ("judge: ", result.get("judge", {}).get("usage"))):
        if usage is not None:
            console.print(
                f"{name}asked {usage['asked']} of {usage['answers']} prompts, the others were kept; "
                f"{usage['input_tokens']} tokens read, {usage['output_tokens']} written"
            )
    console.print(f"written to {output}")


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _shown(name: str, longest: int) -> str:
    """Return the name. Of a word that is too long, such as a path, only the end is left."""
    return " ".join(word if len(word) <= longest else "\u2026" + word[1 - longest :] for word in name.split(" "))
