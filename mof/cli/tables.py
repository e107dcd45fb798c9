"""These functions make the tables and closing lines that `mof eval` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from encoders.console import Console
from mof.evals.text_tables import TextTable


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
