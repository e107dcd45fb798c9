"""MMVP: pairs of photos that CLIP confuses, with one question each (arXiv 2401.06209, section 3).

A folder holds `Questions.csv` (index, Question, Options, Correct Answer) and `MMVP Images/{1..300}.jpg`. Rows 2k-1 and 2k are a
pair: the same question about two photos, with different answers. Only pairs with two right answers count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mof.evals.answering import Answer, Answerer, Prompt, answer_all
from mof.evals.option_matching import match_answer, match_letter, match_text, parse_options
from mof.evals.question_files import check_pairs, find_files, find_image, read_rows

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


@dataclass(frozen=True)
class Question:
    """One row of `Questions.csv`."""

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
        """Question and options as the released script asks them."""
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
    mapping = None if patterns is None else _read_patterns(Path(patterns))
    questions = [_question(file, row, header, mapping, place if images else None) for row in rows[1:]]
    check_pairs(file, [(question.id, question.pattern) for question in questions])
    return questions if CORRECTION_COLUMN in header else _corrected(questions)


def _read_patterns(file: Path) -> dict[str, str]:
    if file.suffix == ".json":
        try:
            mapping = json.loads(file.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
        if not isinstance(mapping, dict) or not all(isinstance(pattern, str) for pattern in mapping.values()):
            raise ValueError(f"{file}: expected an object of ids and patterns")
        return mapping
    rows = read_rows(file)
    if any(len(row) < 2 for row in rows):
        raise ValueError(f"{file}: expected an id and a pattern in each row")
    return {row[0].strip(): row[1].strip() for row in rows}


def _question(
    file: Path, row: Sequence[str], header: Mapping[str, int], patterns: Mapping[str, str] | None, images: Path | None
) -> Question:
    if len(row) <= max(header.values()) or not row[0].strip().isdecimal():
        raise ValueError(f"{file}: expected a number and {len(header) - 1} more cells in each row, got {list(row)}")
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
    """Correct the known wrong labels, unless the file's labels are not the released ones."""
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


def measure(answerer: Answerer, questions: Sequence[Question], prompt: str = "official", *, progress: bool = False) -> Score:
    """Ask the questions and score the answers by the first of `MATCHES` and the released labels; nothing is written."""
    prompts = [replace(question.prompt(prompt), options=()) for question in questions]  # likelihoods are not asked for
    answers, _ = answer_all(answerer, prompts, progress=progress)
    match = next(iter(MATCHES.values()))
    return score(questions, [match(q, a) == q.labels["released"] for q, a in zip(questions, answers, strict=True)])


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1]. Chance is 0.25 for a pair and 0.5 for a question."""

    pair_accuracy: float
    question_accuracy: float
    by_pattern: dict[str, dict[str, float]]
    """Pattern -> "pair_accuracy", "question_accuracy" and number of "pairs"; empty if the file names no patterns."""


def score(questions: Sequence[Question], right: Sequence[bool]) -> Score:
    """Return the shares of right answers. The questions are those of `read_mmvp`; `right` has a value per question."""
    pairs = list(zip(questions[0::2], right[0::2], right[1::2], strict=True))
    patterns: dict[str, list[tuple[bool, bool]]] = {}
    for question, first, second in pairs:
        if question.pattern is not None:
            patterns.setdefault(question.pattern, []).append((first, second))
    everything = _shares([(first, second) for _, first, second in pairs])
    by_pattern = {pattern: _shares(both) for pattern, both in patterns.items()}
    return Score(everything["pair_accuracy"], everything["question_accuracy"], by_pattern)


def _shares(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    both = sum(first and second for first, second in pairs)
    single = sum(first + second for first, second in pairs)
    return {"pair_accuracy": both / len(pairs), "question_accuracy": single / (2 * len(pairs)), "pairs": len(pairs)}
