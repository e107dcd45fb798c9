"""POPE: yes-or-no questions about objects in photos; three strategies draw the objects (arXiv 2305.10355)."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]

STRATEGIES = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class PopeQuestion:
    """One line of a question file."""

    id: str
    """Strategy and number, "random/17": the files of all strategies number from 1."""
    strategy: str
    image: str
    text: str
    present: bool


def read_pope(folder: str | Path) -> list[PopeQuestion]:
    """Return the questions of the files `*pope*random.json`, `...popular.json` and `...adversarial.json`, as far as they exist.

    Raises:
        ValueError: for a folder without these files, two files of one strategy, or a line that is no question.
    """
    questions: list[PopeQuestion] = []
    for strategy in STRATEGIES:
        files = sorted(path for suffix in ("json", "jsonl") for path in Path(folder).glob(f"*pope*{strategy}.{suffix}"))
        if len(files) > 1:
            raise ValueError(f"{folder} holds several files of POPE's {strategy} questions: {', '.join(file.name for file in files)}")
        questions += [question for file in files for question in _read(file, strategy)]
    if not questions:
        raise ValueError(f"{folder} is not POPE: expected files such as coco_pope_random.json")
    return questions


def _read(file: Path, strategy: str) -> list[PopeQuestion]:
    questions = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            id, image, text, label = (row[name] for name in ("question_id", "image", "text", "label"))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}, line {number}: expected question_id, image, text and label, got {line[:200]!r}") from None
        if label not in ("yes", "no") or id in questions:
            raise ValueError(f"{file}, line {number}: expected a label yes or no and an id of its own, got {line[:200]!r}")
        questions[id] = PopeQuestion(f"{strategy}/{id}", strategy, image, text, label == "yes")
    return list(questions.values())


def says_yes(answer: str) -> bool:
    """Return whether the answer means yes by the released evaluator's rule.

    An answer means no if "No", "no" or "not" is a word before its first full stop; commas are removed, and words are split at
    spaces. Everything else means yes, also "NO", "no!", "isn't" and an empty answer.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def says_neither(answer: str) -> bool:
    """Return whether an answer, which counts as yes, holds none of yes, no and not as words, in any spelling."""
    return not {"yes", "no", "not"} & set(re.findall(r"\w+", answer.casefold()))


def says_no_unread(answer: str) -> bool:
    """Return whether an answer counts as yes and says no in a spelling that the released rule does not read: "NO", "no!", "**No**"."""
    words = re.findall(r"\w+", answer.partition(".")[0].casefold())
    return says_yes(answer) and "no" in words and "yes" not in words


def score_pope(questions: Sequence[PopeQuestion], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the `RATES` and the number of "questions" of each strategy, and as "mean" the mean over the strategies that were asked."""
    counts: dict[str, Counts] = {}
    for question, answer in zip(questions, answers, strict=True):
        counts.setdefault(question.strategy, np.zeros(4))[outcome(says_yes(answer), question.present)] += 1
    scores: dict[str, dict[str, float]] = {
        strategy: {**{name: float(rate(by)) for name, rate in RATES.items()}, "questions": int(by.sum())} for strategy, by in counts.items()
    }
    means = {name: statistics.fmean(score[name] for score in scores.values()) for name in RATES}
    return {**scores, "mean": {**means, "questions": len(questions)}}


def outcome(yes: bool, present: bool) -> int:
    """Return the position of an answer in the counts: hit, false alarm, rejection, miss."""
    return (0 if present else 1) if yes else (3 if present else 2)


def _ratio(above: Counts, below: Counts, empty: float) -> Counts:
    return np.where(below > 0, above / np.maximum(below, 1), empty)  # [...]


RATES: dict[str, Callable[[Counts], Counts]] = {
    "accuracy": lambda counts: _ratio(counts[..., 0] + counts[..., 2], counts.sum(axis=-1), math.nan),
    "precision": lambda counts: _ratio(counts[..., 0], counts[..., :2].sum(axis=-1), 0.0),
    "recall": lambda counts: _ratio(counts[..., 0], counts[..., 0] + counts[..., 3], 0.0),
    "f1": lambda counts: _ratio(2 * counts[..., 0], 2 * counts[..., 0] + counts[..., 1] + counts[..., 3], 0.0),
    "yes_ratio": lambda counts: _ratio(counts[..., :2].sum(axis=-1), counts.sum(axis=-1), math.nan),
}
"""Name -> figure [...] in [0, 1] of the counts [..., 4] of a strategy, in the order of `outcome`; "yes" is the positive class.

The precision is 0 without "yes" answers (the released evaluator fails then). `yes_ratio` is the share of "yes" among the answers.
"""
