"""The visual information gain on held-out captions says how much the image helps a model to predict them (arXiv 2602.17186).

The VIG of a caption is its mean loss per token with the blurred image minus its mean loss with the image, in nats. The caption is the
first answer of a record, after the first question. Unlike `vig.score`, which scores records to select them, the loss leaves out the end
of the turn, and the result is an evaluation like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoders.images.opening import ImageError
from mof.data.record_files import UnreadableRow
from mof.data.records import RecordError, to_record
from mof.data.rows import RawRecord, rows_by_id
from mof.evals.answering import Answer, Prompt
from mof.evals.benchmark import Measure, Measured, Row
from mof.evals.intervals import Tally
from mof.evals.other_pictures import OtherPictures
from mof.evals.run import Run

NAME = "captions"
MEASURES = {
    "caption vig": Measure("Captions", "VIG, nats", "loss with the image blurred minus loss with the image", scale=1, compared=True),
    "caption loss": Measure("Captions", "loss, nats", "mean loss per token with the image", "lower", scale=1),
}
HEADLINE = "caption vig", "vig"


@dataclass(frozen=True)
class Caption:
    """Caption holds the text that a model is to predict."""

    prompt: Prompt
    """The messages before the caption, which is the single option."""

    @property
    def images(self) -> list[str]:
        return [str(image) for image in self.prompt.images]


def read_captions(records: Sequence[RawRecord], images: str | Path) -> list[Caption]:
    """Return the captions of the records with an image file before the first answer.

    Args:
        records: LLaVA records or chat messages, as `mof.data.records.to_record` reads them.
        images: the folder in which image paths start.

    Raises:
        ValueError: if no record has a caption.
    """
    captions = []
    for id, raw in rows_by_id(records):
        try:
            record = None if isinstance(raw, UnreadableRow) else to_record(raw, images)
        except (RecordError, ImageError):
            continue
        answers = [] if record is None else [place for place, turn in enumerate(record.messages) if turn["role"] == "assistant"]
        if record is None or not answers:
            continue
        before = record.messages[: answers[0]]
        shown = sum(part["type"] == "image" for message in before for part in message["content"])
        caption = "".join(part["text"] for part in record.messages[answers[0]]["content"] if part["type"] == "text")
        files = [image for image in record.images[:shown] if isinstance(image, (str, Path))]
        if caption.strip() and shown and len(files) == shown:
            captions.append(Caption(Prompt(id, before, list(files), (caption,))))
    if not captions:
        raise ValueError(f"none of the {len(records)} records has an answer after an image file")
    return captions


def eval_captions(run: Run, captions: Sequence[Caption]) -> Row:
    """Measure the VIG of captions. The answerer must give log-likelihoods, as models in this process do."""
    prompts = [caption.prompt for caption in captions]
    files = list(dict.fromkeys(image for caption in captions for image in caption.images))

    def score(answers: list[Answer]) -> tuple[list[Row], Row, list[str]]:
        blurred, _ = run.ask(prompts, OtherPictures(run.answerer, "blurred", files))
        rows: list[Row] = []
        for prompt, *pair in zip(prompts, answers, blurred, strict=True):
            losses = [_loss(run, answer) for answer in pair]
            error = next((answer.error for answer in pair if answer.error is not None), None)
            rows.append({"id": prompt.id, "caption": prompt.options[0], "loss": losses[0], "null_loss": losses[1], "error": error})
        measured = [row for row in rows if row["error"] is None]
        if not measured:
            raise ValueError(f"none of the {len(rows)} captions was measured; {rows[0]['id']} failed with: {rows[0]['error']}")
        figures = {"captions": len(measured), "vig": _mean_vig(measured), "loss": float(np.mean([row["loss"] for row in measured]))}
        return rows, figures, []

    data = [(prompt.id, prompt.messages, prompt.options) for prompt in prompts]
    return run.measure(NAME, prompts, data, score, decoding="no token is generated", refused="they are left out")


def _loss(run: Run, answer: Answer) -> float | None:
    """Return the mean loss per token, or None for a refused prompt. ValueError for an answerer without likelihoods."""
    if answer.error is not None:
        return None
    if not answer.log_likelihoods or not answer.option_tokens:
        raise ValueError(f"{run.answerer.name} gives no log-likelihoods of captions; these need a model in this process and plain decoding")
    return -answer.log_likelihoods[0] / max(answer.option_tokens[0], 1)


def _mean_vig(rows: Sequence[Row]) -> float:
    return float(np.mean([row["null_loss"] - row["loss"] for row in rows]))


def measured(result: Row, rows: list[Row]) -> Measured:
    kept = [row for row in rows if row["error"] is None]
    units = [f"{row['id']}: {row['caption']}" for row in kept]
    vig = [row["null_loss"] - row["loss"] for row in kept]
    figures = {"caption vig": Tally.of(units, vig, 1), "caption loss": Tally.of(units, [row["loss"] for row in kept], 1)}
    return Measured(f"{len(kept)} captions", dict(figures))
