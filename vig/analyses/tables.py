"""The results of the analyses as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE
from rich.table import Table

from vig.analyses.image_attention import ImageAttention
from vig.analyses.image_match import MatchRow
from vig.analyses.misleading_text import Answered


def match_table(rows: Mapping[str, MatchRow], model: str) -> Table:
    """One line per kind of image."""
    table = _table(f"mean sample VIG of the same answers, nats; {model}", "image", "VIG", "+- (95 %)", "VIG above 0", "records")
    for name, row in rows.items():
        error = "-" if row.vig.error is None else f"{1.96 * row.vig.error:.3f}"
        table.add_row(name, f"{row.vig.mean:+.3f}", error, _percent(row.positive), f"{row.vig.n:,}")
    return table


def attention_table(found: Mapping[str, ImageAttention]) -> Table:
    """One line per layer, one column per model; two models also with their difference."""
    models = list(found.values())
    deep = max(len(one.layers) for one in models)
    both = len(models) == 2 and all(len(one.layers) == deep for one in models)
    title = f"share of attention from answers to image tokens, %; {models[0].records:,} records"
    table = _table(title, "layer", *found, *(["difference"] if both else []))
    lines = [(str(i + 1), [one.layers[i] if i < len(one.layers) else None for one in models]) for i in range(deep)]
    lines.append(("mean", [sum(one.layers) / len(one.layers) for one in models]))
    for name, shares in lines:
        cells = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        if both:
            first, second = (share or 0.0 for share in shares)
            cells.append(f"{100 * (second - first):+.1f}")
        table.add_row(name, *cells)
    table.add_row("evenly spread", *(f"{100 * one.even:.1f}" for one in models))
    return table


def misleading_table(found: Mapping[str, Mapping[str, Answered]]) -> Table:
    """Three lines per model: asked alone, misled, and the change."""
    table = _table("accuracy under misleading text", "model", "asked", "right", "pairs right", "says what the text claims", "of")
    for model, by_way in found.items():
        for way, one in by_way.items():
            cells = _percent(one.question_accuracy), _percent(one.pair_accuracy), _percent(one.wrong_option)
            table.add_row(model if way == "alone" else "", way, *cells, f"{one.questions:,}")
        before, after = by_way["alone"], by_way["misled"]
        changes = [
            _change(before.question_accuracy, after.question_accuracy),
            _change(before.pair_accuracy, after.pair_accuracy),
            _change(before.wrong_option, after.wrong_option),
        ]
        table.add_row("", "change", *changes, "", end_section=True)
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{100 * (after - before):+.1f}"
