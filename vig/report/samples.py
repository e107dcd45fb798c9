"""Single records for the page: pictures, questions, and answers token by token."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import PurePath
from typing import Any

from PIL import Image

from encoders.images.reading import ImageError, read_image
from mof.data.records import IMAGE_PLACEHOLDER, ROLES, ImageSource, RecordError, digest, to_mapping, to_record
from mof.data.rows import RawRecord
from vig.answer_words import token_texts, turns
from vig.nulls import NULLS, NullImages
from vig.scoring.scores import Score
from vig.selection.thresholds import Selection

THUMBNAIL = 320  # pixels of the longer side, at most
MOST_IMAGES = 4  # of one record


@dataclass(frozen=True)
class Picture:
    """An image and what stood in its place, as data URIs."""

    name: str
    shown: str | None
    """None when it cannot be read."""
    null: str | None
    """None too for null images that cannot be drawn from the image alone."""


@dataclass(frozen=True)
class Token:
    """One answer token."""

    text: str
    vig: float
    supervised: bool
    """Whether the selection spends loss on it."""
    end_of_turn: bool


@dataclass(frozen=True)
class Turn:
    """A question and its answer; either may be empty."""

    question: str
    answer: list[Token]


@dataclass(frozen=True)
class Sample:
    """One record with its score."""

    score: Score
    source: str | None
    kept: bool
    pictures: list[Picture]
    turns: list[Turn]


class SampleReader:
    """Makes samples of scores.

    Args:
        records: by id, as they were scored.
        identity: of the scoring run; says what the null image was.
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
        null = identity["null"]
        drawable = null["name"] in NULLS and null["name"] != "shuffle"  # that one depends on the other records
        self._nulls = NullImages(null["name"], identity["seed"], only_image=null.get("only_image")) if drawable else None

    def read(self, score: Score) -> Sample:
        """ValueError when its record is not among the records, or has changed since."""
        raw = self._records.get(score.id)
        if raw is None:
            raise ValueError(f"no record has the id {score.id!r}, which is in the scores; give the records that were scored")
        if digest(raw) != score.digest:
            raise ValueError(f"record {score.id!r} is not what was scored; give the records as they were scored")
        record, mask = to_mapping(raw), self._selection.token_masks.get(score.id)
        ends = set(score.turn_ends.tolist())
        on = [False] * len(score.token_vig) if mask is None else mask.tolist()
        texts = zip(token_texts(score), score.token_vig.tolist(), on, strict=True)
        tokens = [Token(text, vig, supervised, i in ends) for i, (text, vig, supervised) in enumerate(texts)]
        answers = [[tokens[i] for i in turn] for turn in turns(score)]
        source = self._selection.sources.get(score.id)
        return Sample(score, source, mask is not None, self._pictures(score.id, record), _turns(_questions(record), answers))

    def _pictures(self, id: str, raw: Mapping[str, Any]) -> list[Picture]:
        if self._folder is None:
            return []
        try:
            sources = to_record(raw, self._folder).images
            images = [read_image(source) for source in sources]
        except (RecordError, ImageError):
            return [Picture(_name(source), None, None) for source in _image_list(raw)][:MOST_IMAGES]
        nulls = [None] * len(images) if self._nulls is None else self._nulls(id, images)
        found = zip(sources, images, nulls, strict=True)
        pictures = [Picture(_name(source), _data_uri(image), _data_uri(null)) for source, image, null in found]
        return pictures[:MOST_IMAGES]


def _image_list(raw: Mapping[str, Any]) -> list[Any]:
    images = raw.get("images") or raw.get("image") or []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _name(source: ImageSource) -> str:
    return PurePath(source).name if isinstance(source, (str, PurePath)) else "image"


def _questions(raw: Mapping[str, Any]) -> list[str]:
    """What the user says, turn by turn, without the image placeholders. The record has been scored, so its form is right."""
    turns = raw.get("conversations", raw.get("messages"))
    return [_text(turn.get("value", turn.get("content"))) for turn in turns if ROLES[turn.get("from", turn.get("role"))] == "user"]


def _text(content: str | Sequence[Mapping[str, str]]) -> str:
    if isinstance(content, str):
        return content.replace(IMAGE_PLACEHOLDER, "").strip()
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _turns(questions: list[str], answers: list[list[Token]]) -> list[Turn]:
    """Together where they match in number; a template without end-of-turn tokens gives all answers as one."""
    if len(answers) == 1 and len(questions) > 1:
        questions = ["\n".join(questions)]
    return [Turn(question or "", answer or []) for question, answer in zip_longest(questions, answers)]


def _data_uri(image: Image.Image | None) -> str | None:
    """A small copy within the page. Tiny images stay as they are, to the bit."""
    if image is None:
        return None
    if max(image.size) > THUMBNAIL:
        image = image.copy()
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    kind = "png" if max(image.size) <= 64 else "jpeg"
    image.save(file, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
