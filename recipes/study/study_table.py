"""The rows of results.json as tables: one line per name, mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table


def study_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """The accuracies with their costs, and pair accuracy by pattern where pairs were asked.

    "misled" is the accuracy of questions after a false statement, where that was measured.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    misled = any("misled_accuracy" in row for row in rows)
    table = Table(title="held-out scenes, right in %; a pair is two questions, by chance 25", box=SIMPLE, padding=0)
    headings = ["pairs", "questions", *(["misled"] if misled else []), "visual tokens", "active tokens", "seconds", "seeds"]
    table.add_column("row", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=" " not in heading)
    for name, same in by_name.items():
        table.add_row(
            name,
            spread([row["pair_accuracy"] for row in same]),
            spread([row["question_accuracy"] for row in same]),
            *([spread([row.get("misled_accuracy") for row in same])] if misled else []),
            str(same[0]["visual_tokens"]),
            f"{statistics.fmean(row['active_tokens'] for row in same):,.0f}",
            f"{statistics.fmean(row['seconds'] for row in same):.0f}",
            str(len(same)),
        )
    patterns = list(rows[-1]["by_pattern"])
    if not patterns:
        return [table]
    detail = Table(title="pair accuracy by pattern, mean over seeds, %", box=SIMPLE, padding=(0, 1, 0, 0))
    detail.add_column("row", no_wrap=True)
    for pattern in patterns:  # headings break rather than names of rows: 80 columns are all that many terminals have
        detail.add_column(pattern, justify="right", overflow="fold")
    for name, same in by_name.items():
        means = [statistics.fmean(row["by_pattern"][pattern] for row in same) for pattern in patterns]
        detail.add_row(name, *(f"{100 * mean:.0f}" for mean in means))
    return [table, detail]


def spread(shares: Sequence[float | None]) -> str:
    """Shares in [0, 1] as "mean +-standard deviation" in %; "-" where nothing was measured."""
    values = [100 * share for share in shares if share is not None]
    if not values:
        return "-"
    return f"{statistics.fmean(values):.1f}" + (f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else "")
