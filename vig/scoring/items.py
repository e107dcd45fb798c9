"""Records are scored item by item: an item is a run of records whose scores become one shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from encoders.cluster import GivenUp, Parts, file_number
from encoders.tables import write_table
from mof.data.rows import Row, id_of
from vig.output_head import cross_entropy, loss_logit_entropy
from vig.scoring.answer_losses import AnswerLosses
from vig.scoring.encoder_branches import EncoderBranches
from vig.scoring.pairs import PairReader
from vig.scoring.passes import TwoPasses
from vig.scoring.score_table import Score, to_table

LANES = 2
"""Items that are scored side by side: the records of one are read and their images decoded while the model works on the other."""


@dataclass(frozen=True)
class ScoreItem:
    """A ScoreItem holds records that are scored together."""

    records: list[Row]
    number: int | None
    """The number of their shard; None returns their scores and writes nothing."""
    swapped: bool = False
    """Whether the records have the images of other records, for the calibration."""
    part: int = 1
    """1 for a whole item; the halves of part n are 2n and 2n + 1."""

    def halves(self) -> list[ScoreItem]:
        middle = len(self.records) // 2
        both = (self.records[:middle], self.records[middle:])
        return [replace(self, records=half, part=2 * self.part + n) for n, half in enumerate(both)] if middle else []


class Scored(NamedTuple):
    """Scored holds the outcome of an item's records."""

    scores: list[Score]
    """The scores, unless they are in a shard."""
    number: int
    sum_of_vig: float
    text_only: list[str]
    failures: dict[str, str]


@dataclass
class Total:
    """A total holds the outcome of all records so far."""

    scores: list[Score] = field(default_factory=list)
    number: int = 0
    sum_of_vig: float = 0.0
    text_only: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, parts: Parts) -> None:
        for part, scored in parts:
            if isinstance(scored, GivenUp):
                self.failures |= dict.fromkeys(map(id_of, part.records), scored.reason)
                continue
            self.scores += scored.scores
            self.text_only += scored.text_only
            self.failures |= scored.failures
            self.number, self.sum_of_vig = self.number + scored.number, self.sum_of_vig + scored.sum_of_vig


class ItemScorer:
    """ItemScorer is the function that scores an item. It writes the shard, and returns the outcome.

    Args:
        new_reader: makes a `PairReader`.
        shard: the path of the shard with a number, out of a folder that all processes see; and the run that it names.
        batch_tokens, batch_size, measures, per_encoder: see `vig.score`.
        moves: whether the model is this process's own: it moves to the GPU, if there is a GPU, and stays in eval mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        new_reader: Callable[..., PairReader],
        shard: tuple[str, str] | None,
        schema: pa.Schema,
        *,
        batch_tokens: int,
        batch_size: int,
        measures: Sequence[str],
        per_encoder: bool,
        moves: bool,
    ) -> None:
        if moves:
            model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._new_reader, self._shard, self._schema = new_reader, shard, schema
        tokenizer = new_reader().processor.tokenizer
        padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # masked out: any id will do
        losses = AnswerLosses(model, padding, loss_logit_entropy if measures else cross_entropy)
        self._branches = EncoderBranches(model) if per_encoder else None
        self._passes = TwoPasses(losses, batch_tokens, batch_size, measures)

    def __call__(self, item: ScoreItem) -> Scored:
        reader = self._new_reader(quiet=item.swapped)  # the records have their own scores
        branches = None if item.swapped else self._branches  # swapped images calibrate the whole model
        scores = self._passes.scores(item.records, reader, branches)
        if item.number is not None and self._shard is not None and scores:
            path, run = self._shard
            write_table(Path(path.format(file_number(item.number, item.part))), to_table(scores, self._schema), run)
        kept = scores if item.number is None else []
        return Scored(kept, len(scores), sum(score.vig for score in scores), reader.text_only, reader.failures)
