"""Answerers answer prompts about images. A cache on disk makes a second run free."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock
from PIL import Image

from encoders.digests import MARK, open_json, seal_json
from encoders.images.opening import ImageError, read_file
from encoders.images.reading import pixels_of
from encoders.progress import progress_bar
from encoders.storage import upload, url_of
from encoders.whole_files import local_path, write_bytes
from mof.data.forms import whole_characters
from mof.data.records import ImageSource
from mof.evals.second_thoughts import without_thoughts

logger = logging.getLogger(__name__)

BETWEEN = 30.0
"""Seconds between two uploads of a cache on other storage."""


@dataclass(frozen=True)
class Prompt:
    """A prompt is a question to an answerer."""

    id: str
    """Unique within a run."""
    messages: list[dict[str, Any]]
    """Chat messages {"role", "content": [{"type": "image"} or {"type": "text", "text": ...}]}."""
    images: list[ImageSource]
    """One per image part, in order: a file or an open image."""
    options: tuple[str, ...] = ()
    """Answers whose log-likelihoods are wanted, if the answerer can give them."""

    @classmethod
    def about(cls, id: str, image: ImageSource | None, text: str, options: tuple[str, ...] = ()) -> Prompt:
        """Make a prompt with a single message of the user: an image, unless it is None, and a text."""
        images = [] if image is None else [image]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        return cls(id, [{"role": "user", "content": content}], images, options)

    def filled(self, part: Callable[[ImageSource], dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with the image parts that `part` makes of the images."""
        images = iter(self.images)
        return [
            {"role": message["role"], "content": [old if old["type"] == "text" else part(next(images)) for old in message["content"]]}
            for message in self.messages
        ]


@dataclass(frozen=True)
class Answer:
    """An answer is the reply to a prompt."""

    text: str
    log_likelihoods: tuple[float, ...] | None = None
    """One per option of the prompt, in nats; None if the answerer gives none."""
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    """Why this prompt will never be answered, such as an endpoint's content filter. The text is then empty."""
    option_tokens: tuple[int, ...] | None = None
    """The number of tokens of each option, with the log-likelihoods."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", whole_characters(self.text))

    @property
    def final(self) -> str:
        """Return the text without the model's thoughts."""
        return without_thoughts(self.text)


class Answerer(Protocol):
    """An answerer answers prompts; `mof.evals.answerers` holds three kinds. It is as deterministic as its model."""

    name: str
    """The name in tables."""
    settings: dict[str, Any]
    """Everything that can change an answer, as JSON: part of the cache's key."""

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """Yield (position in `prompts`, answer) as soon as an answer is there, in any order.

        Raises:
            ValueError: if prompts got no answer, naming the first of them; all other answers are yielded before.
        """


@dataclass(frozen=True)
class Usage:
    """Usage holds the counts of a run. The answerer counts the tokens."""

    answers: int
    input_tokens: int
    """Tokens read for all answers, including those from the cache."""
    output_tokens: int
    asked: int
    """Number of answers that the cache did not hold; the others cost nothing now."""
    asked_input_tokens: int
    asked_output_tokens: int


class AnswerCache:
    """AnswerCache is a file of answers by key, a JSON line with a digest for each. A line is on disk before its answer is used.

    On other storage, the file is uploaded every 30 seconds and at the end of a run. Damaged and incomplete lines are left out, with a
    warning, and deleted when the next answer is written. Several runs may share a file. Lines without a digest or a format version,
    which older releases wrote, are read as well. Lines of a later version are left alone.
    """

    FORMAT = 1
    BEGINNING = b'{"format": '  # of each line

    def __init__(self, file: str | Path) -> None:
        self.file = local_path(file)
        self._answers: dict[str, Answer] = {}
        self._lock = FileLock(self.file.with_name(f"{self.file.name}.lock"), poll_interval=0.005)
        self._uploaded, self._unsent, self._inode = time.monotonic(), list[bytes](), 0
        self._damaged = set[bytes]()  # lines
        content = self.file.read_bytes() if self.file.exists() else b""
        for number, line in ((number, line) for number, line in enumerate(content.split(b"\n"), 1) if line):
            try:
                entry = open_json(line, "the line")
                if entry.get("format", self.FORMAT) == self.FORMAT:
                    self._answers[entry["key"]] = _to_answer(entry["answer"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("%s, line %d holds no whole answer, which will be asked for again: %s", self.file, number, error)
                if isinstance(error, ValueError) and (MARK in line or self.BEGINNING.startswith(line[: len(self.BEGINNING)])):
                    self._damaged.add(line)  # only lines that we wrote: somebody may name a file of other content as the cache

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def put(self, key: str, answer: Answer) -> None:
        self._unsent.append(seal_json({"format": self.FORMAT, "key": key, "answer": dataclasses.asdict(answer)}, indent=None) + b"\n")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._drop_damaged()
            self._append(self._unsent[-1:])
        self._answers[key] = answer
        if time.monotonic() - self._uploaded > BETWEEN:
            self.upload()

    def upload(self) -> None:
        """Upload the file if it is in the copy of a folder on other storage (`encoders.storage`) and there are new answers."""
        if self._unsent:
            with self._lock:
                self._append([])
                upload(self.file, self.file)
            self._unsent.clear()
        self._uploaded = time.monotonic()

    def _drop_damaged(self) -> None:
        """Write the file without the damaged lines. Lines that other runs have added since stay."""
        if self._damaged:
            lines = [line for line in self.file.read_bytes().split(b"\n") if line and line not in self._damaged]
            write_bytes(self.file.resolve(), b"".join(line + b"\n" for line in lines))  # the file may be a link to a shared cache
            self._damaged.clear()

    def _append(self, lines: Sequence[bytes]) -> None:
        try:
            self._write(lines)
        except OSError as error:  # a full disk's error names no file
            raise OSError(error.errno, error.strerror, str(self.file)) from error

    def _write(self, lines: Sequence[bytes]) -> None:
        with self.file.open("a+b") as file:
            inode = os.fstat(file.fileno()).st_ino
            if url_of(self.file) and inode != self._inode:  # a reader on this machine made the copy equal to the storage
                lines, self._inode = self._unsent, inode
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                file.write(b"\n")  # after a write that a kill or a full disk cut off
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())


def _to_answer(fields: dict[str, Any]) -> Answer:
    lists = {name: fields.get(name) for name in ("log_likelihoods", "option_tokens")}  # older releases kept no number of tokens
    return Answer(**fields | {name: None if values is None else tuple(values) for name, values in lists.items()})


def answer_all(
    answerer: Answerer, prompts: Sequence[Prompt], cache: AnswerCache | None = None, *, progress: bool = False
) -> tuple[list[Answer], Usage]:
    """Return the answers in the order of the prompts, and the counts of this run.

    With a cache, only prompts that it does not hold are asked, and equal prompts once. Without a cache, each prompt is asked.

    Raises:
        ValueError: if prompts got no answer (the other answers are in the cache), or if all were refused.
    """
    keys, answers = [], dict[str, Answer]()
    for number, prompt in enumerate(prompts):
        key = f"prompt {number}"
        try:
            if cache is not None and (known := cache.get(key := cache_key(answerer, prompt))) is not None:
                answers[key] = known
        except ImageError as error:  # costs this prompt only
            answers[key] = Answer("", error=str(error))
        keys.append(key)
    todo = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in answers}
    fresh: list[Answer] = []
    with progress_bar("answers", len(todo), progress) as advance:
        waiting = list(todo)
        try:
            for position, answer in answerer.answer(list(todo.values())):
                if cache is not None and answer.error is None:
                    cache.put(waiting[position], answer)
                answers[waiting[position]] = answer
                fresh.append(answer)
                advance(len(fresh), answerer.name)
        finally:
            if cache is not None:
                cache.upload()
    ordered = [answers[key] for key in keys]
    if ordered and all(answer.error is not None for answer in ordered):
        raise ValueError(f"{answerer.name} refused all {len(ordered)} prompts, the first with: {ordered[0].error}")
    return ordered, Usage(*_count(answers.values()), *_count(fresh))


def _count(answers: Collection[Answer]) -> tuple[int, int, int]:
    return len(answers), sum(answer.input_tokens for answer in answers), sum(answer.output_tokens for answer in answers)


def cache_key(answerer: Answerer, prompt: Prompt) -> str:
    """Return the SHA-256 of the answerer's settings, the messages, the content of the images and the options."""
    images = [image_hash(image) for image in prompt.images]
    parts = {"answerer": answerer.settings, "messages": prompt.messages, "images": images, "options": prompt.options}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def image_hash(image: ImageSource) -> str:
    """Return the SHA-256 of an image file, or of the pixels of an open image as encoders see them. ImageError for an unreadable file."""
    if isinstance(image, Image.Image):
        mode, size, pixels = pixels_of(image)
        content = f"{mode} {size}".encode() + pixels
    else:
        content = read_file(image)
    return hashlib.sha256(content).hexdigest()
