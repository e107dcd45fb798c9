"""`misleading_text` asks questions about images, alone and after a false statement (arXiv 2503.02199)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from encoders.images.opening import inside
from encoders.images.reading import read_image
from encoders.progress import tracked
from mof.data.prompts import prompt_inputs, ready_for_prompts
from mof.data.records import ImageSource

Question = Mapping[str, Any]
"""{"question", "image": file or open image, "options": [words], "answer": a word of these}; "false_statement" and "pair" are optional."""

NEEDED = ("question", "image", "options", "answer")


@dataclass(frozen=True)
class Answered:
    """Answered holds the results of a way to ask, as shares in [0, 1]."""

    question_accuracy: float
    pair_accuracy: float | None
    """Share of the pairs with all questions right; None unless every question has a "pair"."""
    wrong_option: float
    """Share of the answers that name the option which the false statement claims."""
    questions: int


def misleading_text(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    ways: Sequence[str] = ("alone", "misled"),
    progress: bool = False,
) -> dict[str, Answered]:
    """Return the accuracy of the model's greedy answers, by the way to ask (of `ways`): "alone" and "misled".

    An answer is right when it holds the right option and no other. To mislead, the "false_statement" is put before the
    question; a question without a false statement gets "The answer is X." with its first wrong option.

    Raises:
        ValueError: for no questions, or a question that lacks an entry, whose answer is no option, or without a wrong option.
    """
    _check(questions)
    claims = [next(option for option in question["options"] if option != question["answer"]) for question in questions]
    statements = [question.get("false_statement") or f"The answer is {claim}." for question, claim in zip(questions, claims, strict=True)]
    asked = {
        "alone": [question["question"] for question in questions],
        "misled": [f"{statement}\n{question['question']}" for question, statement in zip(questions, statements, strict=True)],
    }
    sources = [question["image"] for question in questions]
    images = [image if isinstance(image, Image.Image) or image_folder is None else inside(image_folder, image) for image in sources]
    results = {}
    for name in ways:
        texts, answers = asked[name], list[str]()
        for start in tracked(range(0, len(texts), batch_size), f"batches of questions, {name}", shown=progress):
            part = slice(start, start + batch_size)
            answers += _answers(model, processor, texts[part], images[part], max_new_tokens)
        results[name] = _score(questions, claims, answers)
    return results


def _check(questions: Sequence[Question]) -> None:
    if not questions:
        raise ValueError("there are no questions")
    for number, question in enumerate(questions, start=1):
        if missing := [key for key in NEEDED if key not in question]:
            raise ValueError(f"question {number} has no {missing[0]!r}; expected {', '.join(NEEDED)}")
        options, answer = question["options"], question["answer"]
        if answer not in options or len(set(options)) < 2:
            raise ValueError(f"question {number}: expected two options or more, {answer!r} among them; got {options}")


@torch.inference_mode()
def _answers(
    model: PreTrainedModel, processor: ProcessorMixin, texts: Sequence[str], images: Sequence[ImageSource], max_new_tokens: int
) -> list[str]:
    model.eval()
    ready_for_prompts(processor)
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": read_image(image)}, {"type": "text", "text": text}]}]
        for text, image in zip(texts, images, strict=True)
    ]
    padding = {"padding": True, "padding_side": "left"}  # answers begin where the questions end
    inputs = prompt_inputs(processor, messages, add_generation_prompt=True, processor_kwargs=padding).to(model.device)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)  # [B, L + new]
    return processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _score(questions: Sequence[Question], claims: Sequence[str], answers: Sequence[str]) -> Answered:
    named = [named_option(answer, question["options"]) for answer, question in zip(answers, questions, strict=True)]
    right = [name == question["answer"] for name, question in zip(named, questions, strict=True)]
    pairs: dict[str, list[bool]] = {}
    for question, is_right in zip(questions, right, strict=True):
        if "pair" in question:
            pairs.setdefault(question["pair"], []).append(is_right)
    paired = sum(map(len, pairs.values())) == len(questions)
    return Answered(
        question_accuracy=sum(right) / len(right),
        pair_accuracy=sum(map(all, pairs.values())) / len(pairs) if paired else None,
        wrong_option=sum(name == claim for name, claim in zip(named, claims, strict=True)) / len(named),
        questions=len(right),
    )


def named_option(answer: str, options: Sequence[str]) -> str | None:
    """Return the only option that the answer holds as a word, or None when it holds none of them, or several."""
    named = [option for option in options if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", answer, re.IGNORECASE)]
    return named[0] if len(named) == 1 else None
