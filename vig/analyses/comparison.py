"""All three analyses of several models, on the same records and questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vig.analyses.image_attention import ImageAttention, image_attention
from vig.analyses.image_match import Groups, MatchRow, image_match
from vig.analyses.misleading_text import Answered, Question, misleading_text
from vig.analyses.tables import attention_table, match_table, misleading_table
from vig.saved_models import load_model, model_names


@dataclass(frozen=True)
class Comparison:
    """What was found, by the name of the model."""

    matches: dict[str, dict[str, MatchRow]]
    attention: dict[str, ImageAttention]
    misled: dict[str, dict[str, Answered]]

    def tables(self) -> Iterator[Table]:
        """For a terminal."""
        for name, rows in self.matches.items():
            yield match_table(rows, name)
        yield attention_table(self.attention)
        yield misleading_table(self.misled)

    def figures(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "image match": {name: {group: asdict(row) for group, row in rows.items()} for name, rows in self.matches.items()},
            "attention": {name: asdict(one) for name, one in self.attention.items()},
            "misleading text": {name: {way: asdict(one) for way, one in rows.items()} for name, rows in self.misled.items()},
        }


def compare_models(folders: Sequence[Path], groups: Groups, questions: Sequence[Question]) -> Comparison:
    """Load one saved model after the other and analyse it, with progress bars.

    Args:
        groups: as `image_match` takes them. Attention is that of the "matching" records.
        questions: as `misleading_text` takes them.

    Raises:
        ValueError: for a folder without a model, or what one of the analyses refuses.
    """
    found = Comparison({}, {}, {})
    for name, folder in model_names(folders).items():
        model, processor = load_model(folder, attn_implementation="eager")
        found.matches[name] = image_match(model, processor, groups)
        found.attention[name] = image_attention(model, processor, groups["matching"], progress=True)
        found.misled[name] = misleading_text(model, processor, questions, progress=True)
    return found
