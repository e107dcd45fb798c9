"""MMVP's measure: a pair of questions counts only when both are right (arXiv 2401.06209, section 3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel, ProcessorMixin

Question = dict[str, Any]
"""{"id", "pair", "pattern", "question", "image", "options": [two words], "answer": one of them}"""


@dataclass(frozen=True)
class PairAccuracy:
    """Shares in [0, 1]. By chance a pair is right with 0.25, a question with 0.5."""

    pair_accuracy: float
    question_accuracy: float
    by_pattern: dict[str, float]
    """Pair accuracy per pattern."""


def answer_questions(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question], image_folder: Path, *, batch_size: int = 64
) -> list[str]:
    """The model's greedy answers, in order. The options stand in the question, as in MMVP."""
    model.eval()  # a model that was just trained still drops out
    answers: list[str] = []
    for start in track(range(0, len(questions), batch_size), "answering held-out pairs"):
        batch = questions[start : start + batch_size]
        messages = [
            [{"role": "user", "content": [
                {"type": "image", "image": str(image_folder / one["image"])}, {"type": "text", "text": one["question"]},
            ]}]
            for one in batch
        ]  # fmt: skip
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt", processor_kwargs={"padding": True}
        ).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=16)  # [B, L + new]
        answers += processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def chosen_option(answer: str, options: Sequence[str]) -> str | None:
    """The one option whose words the answer holds; None when it holds none of them, or several."""
    found = [option for option in options if re.search(rf"\b{re.escape(option)}\b", answer, re.IGNORECASE)]
    return found[0] if len(found) == 1 else None


def pair_accuracy(questions: Sequence[Question], answers: Sequence[str]) -> PairAccuracy:
    """Score the answers.

    Raises:
        ValueError: when answers and questions differ in number, or a pair has not exactly two questions.
    """
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions, but {len(answers)} answers")
    right = [chosen_option(a, q["options"]) == q["answer"] for q, a in zip(questions, answers, strict=True)]
    pairs: dict[tuple[str, str], list[bool]] = {}
    for question, is_right in zip(questions, right, strict=True):
        pairs.setdefault((question["pattern"], question["pair"]), []).append(is_right)
    if odd := [pair for (_, pair), both in pairs.items() if len(both) != 2]:
        raise ValueError(f"every pair needs two questions; these have another number: {', '.join(odd[:5])}")
    by_pattern: dict[str, list[bool]] = {}
    for (pattern, _), both in pairs.items():
        by_pattern.setdefault(pattern, []).append(all(both))
    return PairAccuracy(
        pair_accuracy=sum(map(all, pairs.values())) / len(pairs),
        question_accuracy=sum(right) / len(right),
        by_pattern={pattern: sum(both) / len(both) for pattern, both in by_pattern.items()},
    )
