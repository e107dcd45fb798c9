"""`compare_models` makes all three analyses of several models, on the same records and questions. The results become tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from vig.analyses.image_attention import ImageAttention, image_attention
from vig.analyses.image_match import Groups, MatchRow, image_match
from vig.analyses.misleading_text import Answered, Question, misleading_text
from vig.saved_models import load_model, model_names


@dataclass(frozen=True)
class Comparison:
    """Comparison holds the results of each analysis, by the name of the model."""

    matches: dict[str, dict[str, MatchRow]]
    attention: dict[str, ImageAttention]
    misled: dict[str, dict[str, Answered]]

    def tables(self) -> Iterator[Table]:
        """Yield tables for a terminal."""
        for name, rows in self.matches.items():
            yield match_table(rows, name)
        yield attention_table(self.attention)
        yield misleading_table(self.misled)

    def figures(self) -> dict[str, Any]:
        """Return the figures for a JSON file."""
        return {
            "image match": {name: {group: asdict(row) for group, row in rows.items()} for name, rows in self.matches.items()},
            "attention": {name: asdict(shares) for name, shares in self.attention.items()},
            "misleading text": {name: {way: asdict(row) for way, row in rows.items()} for name, rows in self.misled.items()},
        }


def compare_models(folders: Sequence[Path], groups: Groups, questions: Sequence[Question]) -> Comparison:
    """Load one saved model after the other and analyse it, with progress bars.

    Args:
        groups: records as `image_match` takes them. Attention is measured on the "matching" records.
        questions: questions as `misleading_text` takes them.

    Raises:
        ValueError: for a folder without a model, or input that one of the analyses refuses.
    """
    results = Comparison({}, {}, {})
    for name, folder in model_names(folders).items():
        model, processor = load_model(folder, attn_implementation="eager")
        results.matches[name] = image_match(model, processor, groups)
        results.attention[name] = image_attention(model, processor, groups["matching"], progress=True)
        results.misled[name] = misleading_text(model, processor, questions, progress=True)
    return results


def match_table(rows: Mapping[str, MatchRow], model: str) -> Table:
    """Return a table with one line per kind of image. AUROC tells the images of the first line from those of the other lines."""
    table = _table(f"mean sample VIG of the same answers, nats; {model}", "image", "VIG", "+- (95 %)", "VIG above 0", "AUROC", "records")
    for name, row in rows.items():
        error = "-" if row.vig.error is None else f"{1.96 * row.vig.error:.3f}"
        auroc = "" if row.auroc is None else f"{row.auroc.mean:.2f}"
        table.add_row(name, f"{row.vig.mean:+.3f}", error, _percent(row.positive), auroc, f"{row.vig.n:,}")
    return table


def attention_table(by_model: Mapping[str, ImageAttention]) -> Table:
    """Return a table with one line per layer and one column per model; two models also with their difference."""
    models = list(by_model.values())
    deep = max(len(model.layers) for model in models)
    both = len(models) == 2 and all(len(model.layers) == deep for model in models)
    title = f"share of attention from answers to image tokens, %; {models[0].records:,} records"
    table = _table(title, "layer", *by_model, *(["difference"] if both else []))
    lines = [(str(i + 1), [model.layers[i] if i < len(model.layers) else None for model in models]) for i in range(deep)]
    lines.append(("mean", [sum(model.layers) / len(model.layers) for model in models]))
    for name, shares in lines:
        cells = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        if both:
            cells.append(_change(*shares))
        table.add_row(name, *cells)
    table.add_row("evenly spread", *(f"{100 * model.even:.1f}" for model in models))
    return table


def misleading_table(by_model: Mapping[str, Mapping[str, Answered]]) -> Table:
    """Return a table with three lines per model: asked alone, misled, and the change."""
    table = _table("accuracy under misleading text", "model", "asked", "right", "pairs right", "says what the text claims", "of")
    for model, by_way in by_model.items():
        for way, row in by_way.items():
            table.add_row(model if way == "alone" else "", way, *map(_percent, _shares(row)), f"{row.questions:,}")
        changes = map(_change, _shares(by_way["alone"]), _shares(by_way["misled"]))
        table.add_row("", "change", *changes, "", end_section=True)
    return table


def _shares(row: Answered) -> tuple[float | None, ...]:
    return row.question_accuracy, row.pair_accuracy, row.wrong_option


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{100 * (after - before):+.1f}"
