"""SampleReader reads single records for the page: their images, questions, and answers token by token."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import PurePath
from typing import Any

from PIL import Image

from encoders.pages.thumbnails import thumbnail_uri
from mof.data.digests import digest
from mof.data.records import RecordError, images_of, texts_of, to_record
from mof.data.rows import RawRecord
from vig.scoring.score_table import Score
from vig.selection.selected import Selection, was_scored
from vig.words import token_texts, turns

THUMBNAIL = 320  # pixels of the longer side, at most
MOST_IMAGES = 4  # the most images that are shown of a record


@dataclass(frozen=True)
class Picture:
    """Picture holds an image and the null image that took its place, as data URIs."""

    name: str
    shown: str | None
    """None when the image cannot be read."""
    null: str | None
    """None if the image cannot be read, or if its null image depends on other images."""


@dataclass(frozen=True)
class Token:
    """Token holds an answer token, with its VIG."""

    text: str
    vig: float
    supervised: bool
    """Whether the selection gives this token a loss."""
    end_of_turn: bool
    by_encoder: dict[str, float]
    """Encoder -> VIG of this encoder alone; empty for scores without it."""


@dataclass(frozen=True)
class Turn:
    """Turn holds a question and its answer; either may be empty."""

    question: str
    answer: list[Token]


@dataclass(frozen=True)
class Sample:
    """Sample holds a record with its score, as the page shows it."""

    score: Score
    source: str | None
    kept: bool
    pictures: list[Picture]
    turns: list[Turn]


class SampleReader:
    """SampleReader makes samples from scores.

    Args:
        records: id -> record, as it was scored.
        identity: the identity of the scoring run, which names the null image.
        image_folder: None shows no images.
    """

    def __init__(
        self,
        selection: Selection,
        records: Mapping[str, RawRecord],
        identity: Mapping[str, Any],
        image_folder: str | os.PathLike[str] | None,
    ) -> None:
        self._selection, self._records, self._folder = selection, records, image_folder
        self._nulls: Callable[[str, list[Image.Image]], list[Image.Image]] | None = None
        if image_folder is None:
            return
        from vig.nulls import NULLS, NullImages  # slow: torch takes half a gigabyte

        null = identity["null"]
        drawable = null["name"] in NULLS and null["name"] != "shuffle"  # a shuffled image depends on the other records
        self._nulls = NullImages(null["name"], identity["seed"], only_image=null.get("only_image")) if drawable else None

    def read(self, score: Score) -> Sample:
        """Return the record of a score.

        Raises:
            ValueError: when the record is not among the records, or has changed since it was scored.
        """
        raw = self._records.get(score.id)
        if raw is None:
            raise ValueError(f"no record has the id {score.id!r}, which is in the scores; give the records that were scored")
        if not was_scored(raw, digest(raw), score.digest):
            raise ValueError(f"record {score.id!r} is not what was scored; give the records as they were scored")
        mask, ends = self._selection.token_masks.get(score.id), set(score.turn_ends.tolist())
        supervised = [False] * len(score.token_vig) if mask is None else mask.tolist()
        texts, vig = token_texts(score), score.token_vig.tolist()
        split = {name: values.tolist() for name, values in score.encoder_vig.items()}

        def token(i: int) -> Token:
            return Token(texts[i], vig[i], supervised[i], i in ends, {name: values[i] for name, values in split.items()})

        answers = [[token(i) for i in turn.tolist()] for turn in turns(score)]
        source = self._selection.sources.get(score.id)
        return Sample(score, source, mask is not None, self._pictures(score.id, raw), _turns(texts_of(raw, "user"), answers))

    def _pictures(self, id: str, raw: RawRecord) -> list[Picture]:
        if self._folder is None:
            return []
        from encoders.images.reading import ImageError, read_image  # slow, as above

        try:
            sources = to_record(raw, self._folder).images
            images = [read_image(source) for source in sources]
        except (RecordError, ImageError):
            return [Picture(_name(source), None, None) for source in images_of(raw)][:MOST_IMAGES]
        nulls = [None] * len(images) if self._nulls is None else self._nulls(id, images)
        triples = list(zip(sources, images, nulls, strict=True))[:MOST_IMAGES]
        return [
            Picture(_name(source), thumbnail_uri(image, THUMBNAIL), None if null is None else thumbnail_uri(null, THUMBNAIL))
            for source, image, null in triples
        ]


def _name(source: Any) -> str:
    return PurePath(source).name if isinstance(source, (str, PurePath)) else "image"


def _turns(questions: list[str], answers: list[list[Token]]) -> list[Turn]:
    """Return questions with their answers. A template without end-of-turn tokens gives all answers as one turn, with all questions."""
    if len(answers) == 1 and len(questions) > 1:
        questions = ["\n".join(questions)]
    return [Turn(question or "", answer or []) for question, answer in zip_longest(questions, answers)]
