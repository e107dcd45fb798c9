"""POPE asks yes-or-no questions about objects in photos. Three strategies draw the objects (arXiv 2305.10355)."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoders.images.opening import inside
from encoders.text_files import parse_json, read_utf8
from mof.evals.answering import Answer, Prompt
from mof.evals.benchmark import Measure, Measured, Row
from mof.evals.intervals import Counts, Figure, Tally, mean_interval
from mof.evals.run import Run

NAME = "pope"
CHANCE = 0.5
MEASURES = {
    "pope accuracy": Measure("POPE", "accuracy, %", "yes-or-no questions about objects; mean over the strategies", chance=CHANCE),
    "pope f1": Measure("POPE", "F1, %", "F1 of the answer yes, mean over the strategies; always saying yes gives 66.7", compared=True),
    "pope yes": Measure("POPE", "said yes, %", "share of answers that say yes; yes is right for half of the questions", ""),
}
HEADLINE = "pope accuracy", "accuracy"
STRATEGIES = ("random", "popular", "adversarial")
ALL_QUESTIONS = 3000  # for each strategy, in the whole benchmark


@dataclass(frozen=True)
class PopeQuestion:
    """PopeQuestion holds a line of a question file."""

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
    for number, line in enumerate(read_utf8(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, "the line")
            id, image, text, label = (row[name] for name in ("question_id", "image", "text", "label"))
            good = isinstance(id, int | str) and isinstance(image, str) and isinstance(text, str)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise ValueError(f"{file}, line {number}: expected question_id, image, text and label, got {line[:200]!r}")
        question_id = f"{strategy}/{id}"
        if label not in ("yes", "no") or question_id in questions:
            raise ValueError(f"{file}, line {number}: expected a label yes or no and an id of its own, got {line[:200]!r}")
        questions[question_id] = PopeQuestion(question_id, strategy, image, text, label == "yes")
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


def eval_pope(run: Run, questions: Sequence[PopeQuestion], images: Path | None) -> Row:
    """Measure POPE by strategy, and the mean over strategies. `images` is the folder of the photos, None for finished answers."""

    def score(answers: list[Answer]) -> tuple[list[Row], Row, list[str]]:
        rows: list[Row] = [
            {
                "id": q.id, "image": q.image, "text": q.text, "present": q.present,
                "answer": a.text, "error": a.error, "yes": says_yes(a.final),
            }
            for q, a in zip(questions, answers, strict=True)
        ]  # fmt: skip
        texts = [answer.final for answer in answers]
        scores = score_pope(questions, texts)
        neither, unread = (sum(map(says, texts)) for says in (says_neither, says_no_unread))
        notes = [f"{neither} of {len(texts)} answers say neither yes nor no: they count as yes by the released rule"] if neither else []
        notes += _no_better_than_chance(rows)
        notes += [f"{unread} answers say no in a spelling that the released rule counts as yes"] if unread else []
        missing = [strategy for strategy in STRATEGIES if strategy not in scores]
        notes += [f"the mean leaves out {', '.join(missing)}: no questions"] if missing else []
        counts = {name: by["questions"] for name, by in scores.items() if name != "mean"}
        notes += [f"{count} of {ALL_QUESTIONS} {name} questions" for name, count in counts.items() if count != ALL_QUESTIONS]
        return rows, {**scores["mean"], "scores": scores, "neither": neither}, notes

    prompts = [Prompt.about(q.id, None if images is None else inside(images, q.image), q.text) for q in questions]
    data = [(q.id, q.image, q.text, q.present) for q in questions]
    refused = "they count as yes, as empty answers do by the released rule"
    return run.measure(NAME, prompts, data, score, decoding="POPE prescribes no decoding", refused=refused)


def _no_better_than_chance(rows: list[Row]) -> list[str]:
    """Return a note if the accuracy may be chance, as for a model that was never taught to answer by yes or no, or else nothing."""
    accuracy = measured({}, rows).figures["pope accuracy"]
    interval = mean_interval([accuracy])
    if interval is None or interval[0] > CHANCE:
        return []
    low, high = (100 * end for end in interval)
    return [
        f"the accuracy, {100 * accuracy.value:.1f} % with a 95 % interval of [{low:.1f}, {high:.1f}], is not above chance ({CHANCE:.0%}): "
        "the model's yes and no do not follow the photos, so that F1 and the other figures show its habit alone"
    ]


def measured(result: Row, rows: list[Row]) -> Measured:
    """Return the figures. The units are photos: each is asked about six times per strategy."""
    strategies = list(dict.fromkeys(row["id"].partition("/")[0] for row in rows))
    photos: dict[str, list[Row]] = {}
    for row in rows:
        photos.setdefault(row["image"], []).append(row)
    counts = np.zeros((len(photos), len(strategies), 4))  # [U, S, 4]
    for photo, asked in enumerate(photos.values()):
        for row in asked:
            counts[photo, strategies.index(row["id"].partition("/")[0]), outcome(row["yes"], row["present"])] += 1
    units = tuple(f"{name}: {[(row['id'], row['text'], row['present']) for row in asked]}" for name, asked in photos.items())
    flat = counts.reshape(len(photos), -1)  # [U, S*4]
    rates = {"accuracy": "accuracy", "f1": "f1", "yes": "yes_ratio"}
    basis = f"{len(rows)} questions about {len(photos)} photos ({', '.join(strategies)})"
    figures: dict[str, Figure] = {f"pope {key}": Tally(units, flat, _by_strategy(RATES[name])) for key, name in rates.items()}
    parts = {strategy: Tally(units, counts[:, place], RATES["accuracy"]) for place, strategy in enumerate(strategies)}
    return Measured(basis, figures, parts=parts)


def _by_strategy(rate: Callable[[Counts], Counts]) -> Callable[[Counts], Counts]:
    """Return the mean over the strategies of a rate, as a function of their counts [..., S*4]."""
    return lambda counts: rate(counts.reshape(*counts.shape[:-1], -1, 4)).mean(axis=-1)  # [...]
