"""Whatever answers questions about images, behind one protocol, and a cache on disk that makes a second run free."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from rich.progress import Progress

from encoders import ImageError
from mof.data.records import ImageSource


@dataclass(frozen=True)
class Prompt:
    """What is asked once."""

    id: str
    """Unique within a run."""
    messages: list[dict[str, Any]]
    """Chat messages {"role", "content": [{"type": "image"} or {"type": "text", "text": ...}]}."""
    images: list[ImageSource]
    """One per image part, in order: a file or an open image."""
    options: tuple[str, ...] = ()
    """Answers whose log-likelihoods are wanted, where the answerer can give them."""

    @classmethod
    def about(cls, id: str, image: ImageSource, text: str, options: tuple[str, ...] = ()) -> Prompt:
        """One image and then a text, as one message of the user."""
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return cls(id, [{"role": "user", "content": content}], [image], options)


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str
    log_likelihoods: tuple[float, ...] | None = None
    """One per option of the prompt, in nats; None where the answerer gives none."""
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    """Why this prompt will never be answered, such as an endpoint's content filter. The text is then empty."""


class Answerer(Protocol):
    """Anything that answers; `mof.evals.answerers` holds three. Deterministic as far as the model behind it is."""

    name: str
    """For tables."""
    settings: dict[str, Any]
    """All that can change an answer, as JSON: part of the cache's key."""

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """(position in `prompts`, its answer), each as soon as it is there, in any order.

        Raises:
            ValueError: after all that could be answered, when some could not be; naming the first.
        """


@dataclass(frozen=True)
class Usage:
    """Counts of one run. Tokens are as the answerer counts them."""

    answers: int
    input_tokens: int
    """Behind all answers, those out of the cache included."""
    output_tokens: int
    asked: int
    """Of `answers`, how many the cache did not hold; the others cost nothing now."""
    asked_input_tokens: int
    asked_output_tokens: int

    def costs(self, price_in: float, price_out: float) -> dict[str, float]:
        """Of all answers, and of those asked now; in the currency of the prices, which are per million tokens."""
        return {
            "cost": (self.input_tokens * price_in + self.output_tokens * price_out) / 1e6,
            "asked_cost": (self.asked_input_tokens * price_in + self.asked_output_tokens * price_out) / 1e6,
        }


class AnswerCache:
    """Answers by key, one JSON line each. A line is on disk before its answer is used; a torn last line is dropped."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._answers: dict[str, Answer] = {}
        content = self.file.read_bytes() if self.file.exists() else b""
        self._torn = bool(content) and not content.endswith(b"\n")
        for line in content.split(b"\n"):
            try:
                entry = json.loads(line)
                self._answers[entry["key"]] = _to_answer(entry["answer"])
            except (ValueError, KeyError, TypeError):  # torn or empty
                continue

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def put(self, key: str, answer: Answer) -> None:
        line = json.dumps({"key": key, "answer": dataclasses.asdict(answer)}).encode() + b"\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab", buffering=0) as file:
            file.write(b"\n" + line if self._torn else line)  # one write, so that two runs may share a file
            os.fsync(file.fileno())
        self._torn = False
        self._answers[key] = answer


def _to_answer(fields: dict[str, Any]) -> Answer:
    likelihoods = fields["log_likelihoods"]
    return Answer(**fields | {"log_likelihoods": None if likelihoods is None else tuple(likelihoods)})


def answer_all(
    answerer: Answerer, prompts: Sequence[Prompt], cache: AnswerCache | None = None, *, progress: bool = False
) -> tuple[list[Answer], Usage]:
    """The answers in the order of the prompts. Only what the cache does not hold is asked, and equal prompts once.

    Without a cache, each prompt is asked.

    Raises:
        ValueError: when some prompts got no answer (those that did are in the cache), or when all were refused.
    """
    keys = [str(i) if cache is None else cache_key(answerer, prompt) for i, prompt in enumerate(prompts)]
    answers = {key: answer for key in keys if cache is not None and (answer := cache.get(key)) is not None}
    todo = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in answers}
    fresh: list[Answer] = []
    with Progress(disable=not progress) as bar:
        task = bar.add_task(f"asking {answerer.name}", total=len(keys), completed=len(keys) - len(todo))
        waiting = list(todo)
        for position, answer in answerer.answer(list(todo.values())):
            if cache is not None and answer.error is None:
                cache.put(waiting[position], answer)
            answers[waiting[position]] = answer
            fresh.append(answer)
            bar.advance(task)
    ordered = [answers[key] for key in keys]
    if ordered and all(answer.error is not None for answer in ordered):
        raise ValueError(f"{answerer.name} refused all {len(ordered)} prompts, the first with: {ordered[0].error}")
    return ordered, Usage(*_count(answers.values()), *_count(fresh))


def _count(answers: Collection[Answer]) -> tuple[int, int, int]:
    return len(answers), sum(one.input_tokens for one in answers), sum(one.output_tokens for one in answers)


def cache_key(answerer: Answerer, prompt: Prompt) -> str:
    """SHA-256 of who answers, what is asked, the content of the images and the options."""
    images = [_image_hash(image) for image in prompt.images]
    parts = {"answerer": answerer.settings, "messages": prompt.messages, "images": images, "options": prompt.options}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _image_hash(image: ImageSource) -> str:
    if isinstance(image, Image.Image):
        content = f"{image.mode} {image.size}".encode() + image.tobytes()
    else:
        try:
            content = Path(image).read_bytes()
        except OSError as error:
            raise ImageError(f"{image}: cannot be read ({error.strerror})") from None
    return hashlib.sha256(content).hexdigest()
