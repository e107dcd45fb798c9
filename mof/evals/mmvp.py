"""MMVP has pairs of photos that CLIP confuses, with a question for each pair (arXiv 2401.06209, section 3).

A folder holds `Questions.csv` (index, Question, Options, Correct Answer) and `MMVP Images/{1..300}.jpg`. Rows 2k-1 and 2k are a
pair: the same question about two photos, with different answers. Only pairs with two right answers count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mof.evals.answering import Answer, Answerer, Prompt
from mof.evals.benchmark import Measure, Measured, Row
from mof.evals.intervals import Figure, Tally
from mof.evals.judge import judged
from mof.evals.option_matching import match_answer, match_letter, match_text, parse_options
from mof.evals.question_files import check_pairs, find_files, find_image, read_patterns, read_rows
from mof.evals.run import Run

NAME = "mmvp"
MEASURES = {
    "mmvp pairs": Measure(
        "MMVP", "right pairs, %", "pairs of photos with both questions right, by released labels: the headline", chance=0.25, compared=True
    ),
    "mmvp questions": Measure("MMVP", "right questions, %", "single questions answered right; not comparable with pairs", chance=0.5),
    "mmvp pairs corrected": Measure(
        "MMVP", "right pairs, mended labels, %", "the same pairs with the four known wrong labels corrected", chance=0.25
    ),
    "mmvp likelihood pairs": Measure(
        "MMVP", "right pairs by likelihood, %", "the option with the higher likelihood counts in place of the generated answer", chance=0.25
    ),
    "mmvp judge pairs": Measure("MMVP", "right pairs by judge, %", "a language model says whether the answer is right", chance=0.25),
}
HEADLINE = "mmvp pairs", "pair_accuracy"
IMAGE_FOLDERS = ("MMVP Images", "MMVP_Images", "MMVP Imgaes", "images")  # the third is the released script's spelling
PATTERN_COLUMNS = ("category", "pattern", "type")
WRONG_LABELS = {99: ("a", "b"), 100: ("b", "a"), 279: ("a", "b"), 280: ("b", "a")}
"""Row -> (released, corrected) of the known wrong labels. They are corrected if a file has the released labels."""
FIRST_QUESTION = "Are the butterfly's wings closer to being open or closed?"
"""The first question of the released file: other files in its form have other questions."""
CORRECTION_COLUMN = "corrected answer"
"""A column that replaces `WRONG_LABELS` in files with other questions."""
LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
PROMPTS: dict[str, Callable[[Question], str]] = {
    "official": lambda asked: asked.text,
    "letter": lambda asked: f"{asked.text}\n{LETTER_REQUEST}",
    "question": lambda asked: asked.question,  # for files whose questions name their options
}
LABELS = ("released", "corrected")
ALL_QUESTIONS = 300  # in the whole benchmark


@dataclass(frozen=True)
class Question:
    """A question is a row of `Questions.csv`."""

    id: int
    question: str
    options_text: str
    """The options as the file spells them: "(a) Open (b) Closed"."""
    labels: dict[str, str]
    """The right option's letter, by `LABELS`."""
    pattern: str | None = None
    image: Path | None = None

    @property
    def options(self) -> dict[str, str]:
        return parse_options(self.options_text)

    @property
    def text(self) -> str:
        """Return the question and its options as the released script asks them."""
        return f"{self.question} {self.options_text}"

    def prompt(self, kind: str) -> Prompt:
        """Return the prompt of this kind, one of `PROMPTS`. Its options are the letters in brackets, which have equal lengths."""
        letters = tuple(f"({letter})" for letter in self.options)
        return Prompt.about(str(self.id), None if self.image is None else str(self.image), PROMPTS[kind](self), letters)


def read_mmvp(folder: str | Path, patterns: str | Path | None = None, *, images: bool = True) -> list[Question]:
    """Return the rows of a folder; two neighbours are a pair.

    Args:
        folder: holds `Questions.csv`, whose first column is the index under any name.
        patterns: a .json {id: pattern} or a .csv of id and pattern, for files without a column Category, Pattern or Type.
        images: whether the photos are needed; finished answers are scored without them.

    Raises:
        ValueError: naming what is wrong with the folder or with a row.
    """
    file, place = find_files(Path(folder), "MMVP", IMAGE_FOLDERS, images)
    rows = read_rows(file)
    header = {name.strip().lower(): position for position, name in enumerate(rows[0])} if rows else {}
    if missing := {"question", "options", "correct answer"} - header.keys():
        raise ValueError(f"{file} lacks the columns {', '.join(sorted(missing))}; it has {rows[0] if rows else 'no rows'}")
    mapping = None if patterns is None else read_patterns(Path(patterns))
    questions = [_question(file, row, header, mapping, place if images else None) for row in rows[1:]]
    check_pairs(file, [(question.id, question.pattern) for question in questions])
    return questions if CORRECTION_COLUMN in header else _corrected(questions)


def _question(
    file: Path, row: Sequence[str], header: Mapping[str, int], patterns: Mapping[str, str] | None, images: Path | None
) -> Question:
    if len(row) <= max(header.values()) or not re.fullmatch("[0-9]{1,9}", row[0].strip()):
        raise ValueError(f"{file}: expected a number and {len(header) - 1} more cells in each row, got {str(list(row))[:200]}")
    id = int(row[0])
    cells = {name: " ".join(row[position].split()) for name, position in header.items()}
    try:
        letters = parse_options(cells["options"]).keys()
    except ValueError as error:
        raise ValueError(f"{file}, row {id}: {error}") from None
    right = cells["correct answer"].strip("() ").lower()
    label = cells.get(CORRECTION_COLUMN, right).strip("() ").lower()
    if not {right, label} <= letters:
        raise ValueError(f"{file}, row {id}: the right answer should be one of {', '.join(letters)}, got {right!r} and {label!r}")
    if patterns is None:
        pattern = next((cells[name] for name in PATTERN_COLUMNS if cells.get(name)), None)
    elif (pattern := patterns.get(str(id))) is None:
        raise ValueError(f"row {id} of {file} has no pattern in the mapping")
    image = None if images is None else find_image(file, id, [images])
    return Question(id, cells["question"], cells["options"], {"released": right, "corrected": label}, pattern, image)


def _corrected(questions: Sequence[Question]) -> list[Question]:
    """Correct the known wrong labels, unless the file has other labels than the released file."""
    known = [question for question in questions if question.id in WRONG_LABELS]
    if not all(question.labels["released"] == WRONG_LABELS[question.id][0] for question in known):
        return list(questions)
    return [
        replace(question, labels=question.labels | {"corrected": WRONG_LABELS[question.id][1]}) if question.id in WRONG_LABELS else question
        for question in questions
    ]


def _likeliest(question: Question, answer: Answer) -> str | None:
    scores = answer.log_likelihoods or ()
    best = [letter for letter, score in zip(question.options, scores, strict=False) if score == max(scores)]
    return best[0] if len(best) == 1 else None


MATCHES: dict[str, Callable[[Question, Answer], str | None]] = {
    "letter or text": lambda question, answer: match_answer(answer.text, question.options),
    "letter": lambda question, answer: match_letter(answer.text, question.options),
    "text": lambda question, answer: match_text(answer.text, question.options),
    "likelihood": _likeliest,
}
"""Ways to match an answer to an option's letter; the first gives a result's headline."""


@dataclass(frozen=True)
class Score:
    """Score holds shares in [0, 1]. Chance is 0.25 for a pair and 0.5 for a question."""

    pair_accuracy: float
    question_accuracy: float
    by_pattern: dict[str, dict[str, float]]
    """Pattern -> "pair_accuracy", "question_accuracy" and number of "pairs"; empty if the file names no patterns."""


def score(questions: Sequence[Question], right: Sequence[bool]) -> Score:
    """Return the shares of right answers. `read_mmvp` returns the questions; `right` has a value per question."""
    pairs = np.reshape(right, (-1, 2))  # [U, 2]
    patterns = [question.pattern for question in questions[0::2]]
    by_pattern = {name: _shares(pairs[[pattern == name for pattern in patterns]]) for name in dict.fromkeys(patterns) if name is not None}
    everything = _shares(pairs)
    return Score(everything["pair_accuracy"], everything["question_accuracy"], by_pattern)


def _shares(pairs: NDArray[np.bool_]) -> dict[str, float]:
    return {"pair_accuracy": float(pairs.all(axis=1).mean()), "question_accuracy": float(pairs.mean()), "pairs": len(pairs)}


def eval_mmvp(run: Run, questions: Sequence[Question], prompt: str = "official", judge: Answerer | None = None) -> Row:
    """Measure pair and question accuracy, by each way to match answers and by released and corrected labels."""

    def scored(answers: list[Answer]) -> tuple[list[Row], Row, list[str]]:
        rows, figures = _scored(run, questions, answers, judge)
        return rows, {"prompt": prompt, **figures}, _deviations(questions, prompt, judge)

    data = [(q.id, q.text, q.labels, q.pattern) for q in questions]
    return run.measure(
        NAME, [question.prompt(prompt) for question in questions], data, scored,
        decoding="the official run samples at temperature 0.2", refused="they count as wrong",
        prompt=prompt, judge=None if judge is None else judge.settings,
    )  # fmt: skip


def _scored(run: Run, questions: Sequence[Question], answers: list[Answer], judge: Answerer | None) -> tuple[list[Row], Row]:
    likelihoods = any(answer.log_likelihoods for answer in answers) and all(answer.log_likelihoods or answer.error for answer in answers)
    matchers = {name: match for name, match in MATCHES.items() if name != "likelihood" or likelihoods}
    chosen = {name: [match(q, a) for q, a in zip(questions, answers, strict=True)] for name, match in matchers.items()}
    right = {
        name: {labels: [letter == q.labels[labels] for letter, q in zip(letters, questions, strict=True)] for labels in LABELS}
        for name, letters in chosen.items()
    }
    headline = next(iter(MATCHES))
    further = {}
    if judge is not None:
        right["judge"], further["judge"] = judged(run, judge, questions, answers, right[headline]["released"])
    rows: list[Row] = [
        {
            "id": q.id, "pattern": q.pattern, "prompt": q.text, "labels": q.labels, "answer": a.text, "error": a.error,
            "image": None if q.image is None else str(q.image.resolve()), "log_likelihoods": a.log_likelihoods,
            "chosen": {name: letters[i] for name, letters in chosen.items()},
            "right": {name: {labels: by[labels][i] for labels in LABELS} for name, by in right.items()},
        }
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]  # fmt: skip
    scores = {name: {labels: asdict(score(questions, by[labels])) for labels in LABELS} for name, by in right.items()}
    best = scores[headline]["released"]
    return rows, {
        "questions": len(questions), "pairs": len(questions) // 2, "matched_by": headline, "labels": "released",
        "pair_accuracy": best["pair_accuracy"], "question_accuracy": best["question_accuracy"], "scores": scores,
        "corrected_rows": [q.id for q in questions if q.labels["released"] != q.labels["corrected"]],
        "unmatched": [row["id"] for row in rows if row["chosen"][headline] is None], **further,
    }  # fmt: skip


def _deviations(questions: Sequence[Question], prompt: str, judge: Answerer | None) -> list[str]:
    notes = [] if prompt == "official" else [f"asked with the {prompt} prompt"]
    if judge is None:
        notes.append("answers matched to options by rule; the official run asks gpt-4-0314")
    elif judge.name != "gpt-4-0314":
        notes.append(f"judged by {judge.name} at temperature 0; the official run asks gpt-4-0314 at 0.2")
    if questions[0].id == 1 and questions[0].question != FIRST_QUESTION:
        notes.append(f"{len(questions)} questions of another file than MMVP's")
    elif len(questions) != ALL_QUESTIONS:
        notes.append(f"{len(questions)} of {ALL_QUESTIONS} questions")
    return notes


def measured(result: Row, rows: list[Row]) -> Measured:
    pairs = list(zip(rows[0::2], rows[1::2], strict=True))
    units = [f"{a['prompt']} {a['labels']} / {b['prompt']} {b['labels']}" for a, b in pairs]
    headline = result["matched_by"]
    figures: dict[str, Figure] = {}
    for way in result["scores"]:
        name = "mmvp" if way == headline else f"mmvp {way}"
        for labels, suffix in zip(LABELS, ("", " corrected"), strict=True):
            right = np.reshape([bool(row["right"][way][labels]) for row in rows], (-1, 2))  # [U, 2]
            figures[f"{name} pairs{suffix}"] = Tally.of(units, right.all(axis=1), 1)
            figures[f"{name} questions{suffix}"] = Tally.of(units, right.sum(axis=1), 2)
    by_pattern = result["scores"][headline]["released"]["by_pattern"]
    wrong = [pair for pair in pairs if not all(row["right"][headline]["released"] for row in pair)]
    patterns = {name: shares["pair_accuracy"] for name, shares in by_pattern.items()}
    return Measured(f"{len(pairs)} pairs", figures, patterns, _parts(pairs, units, headline), wrong)


def _parts(pairs: Sequence[tuple[Row, Row]], units: Sequence[str], way: str) -> dict[str, Tally]:
    """Return pattern -> share of right pairs, by released labels."""
    patterns = [first["pattern"] for first, _ in pairs]
    right = [all(row["right"][way]["released"] for row in pair) for pair in pairs]
    parts = {}
    for name in dict.fromkeys(pattern for pattern in patterns if pattern is not None):
        own = [place for place, pattern in enumerate(patterns) if pattern == name]
        parts[name] = Tally.of([units[place] for place in own], [right[place] for place in own], 1)
    return parts
