"""POPE: is an object in the photo, yes or no, with objects drawn by three strategies (arXiv 2305.10355)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STRATEGIES = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class PopeQuestion:
    """One line of a question file."""

    id: str
    """"random/17": the files of all strategies number from 1."""
    strategy: str
    image: str
    text: str
    present: bool


def read_pope(folder: str | Path) -> list[PopeQuestion]:
    """The questions of the files `*pope*random.json`, `...popular.json` and `...adversarial.json` that are there.

    Raises:
        ValueError: for a folder without any, two files of one strategy, or a line that is no question.
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
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
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
    """The released evaluator's rule: in what stands before the first full stop, without commas and split at spaces, "No", "no"
    or "not" means no. Everything else means yes: "NO", "no!", "isn't" and an empty answer, too.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


@dataclass(frozen=True)
class PopeScore:
    """Shares in [0, 1]; "yes" is the positive class."""

    accuracy: float
    precision: float
    """Of the "yes" answers, how many are right; 0 where there is none (the released evaluator fails there)."""
    recall: float
    f1: float
    yes_ratio: float
    """Of the answers."""
    questions: int


def score_pope(questions: Sequence[PopeQuestion], answers: Sequence[str]) -> dict[str, PopeScore]:
    """Per strategy, and as "mean" the mean over the strategies that were asked."""
    scores = {}
    for strategy in dict.fromkeys(question.strategy for question in questions):
        pairs = [(says_yes(a), q.present) for q, a in zip(questions, answers, strict=True) if q.strategy == strategy]
        scores[strategy] = _score(pairs)
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    means = {name: statistics.fmean(getattr(score, name) for score in scores.values()) for name in names}
    return scores | {"mean": PopeScore(**means, questions=len(questions))}


def _score(pairs: Sequence[tuple[bool, bool]]) -> PopeScore:
    hits = sum(said and present for said, present in pairs)
    said, present = sum(said for said, _ in pairs), sum(present for _, present in pairs)
    precision, recall = (hits / said if said else 0.0), (hits / present if present else 0.0)
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return PopeScore(sum(a == b for a, b in pairs) / len(pairs), precision, recall, f1, said / len(pairs), len(pairs))
