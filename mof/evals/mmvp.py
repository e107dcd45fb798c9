"""MMVP: pairs of photos that CLIP confuses, one question each, right only in pairs (arXiv 2401.06209, section 3).

A folder holds `Questions.csv` (index, Question, Options, Correct Answer) and `MMVP Images/{1..300}.jpg`. Rows 2k-1 and 2k are a
pair: the same question about two photos, with different answers.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mof.evals.answering import Answer, Answerer, Prompt, answer_all
from mof.evals.option_matching import match_answer, match_letter, match_text, parse_options

IMAGE_FOLDERS = ("MMVP Images", "MMVP_Images", "MMVP Imgaes", "images")  # the third is the released script's spelling
SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG")
PATTERN_COLUMNS = ("category", "pattern", "type")
WRONG_LABELS = {99: ("a", "b"), 100: ("b", "a"), 279: ("a", "b"), 280: ("b", "a")}
"""Rows whose released label is known to be wrong: (released, corrected). Applied where a file's labels are the released ones."""
FIRST_QUESTION = "Are the butterfly's wings closer to being open or closed?"
"""Of the released file: others in its form have questions of their own."""
CORRECTION_COLUMN = "corrected answer"
"""A column that replaces `WRONG_LABELS`: for files in MMVP's form with questions of their own."""
LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
PROMPTS: dict[str, Callable[[Question], str]] = {
    "official": lambda asked: asked.text,
    "letter": lambda asked: f"{asked.text}\n{LETTER_REQUEST}",
    "question": lambda asked: asked.question,  # for files whose questions name their options
}
LABELS = ("released", "corrected")


@dataclass(frozen=True)
class Question:
    """One row."""

    id: int
    question: str
    options_text: str
    """As in the file, such as "(a) Open (b) Closed"."""
    labels: dict[str, str]
    """The right option's letter, by `LABELS`."""
    pattern: str | None = None
    image: Path | None = None

    @property
    def options(self) -> dict[str, str]:
        return parse_options(self.options_text)

    @property
    def text(self) -> str:
        """Question and options, as the released script asks them."""
        return f"{self.question} {self.options_text}"

    def prompt(self, kind: str) -> Prompt:
        """Kind: one of `PROMPTS`. The options that are weighed are the letters as the question spells them, of equal length."""
        letters = tuple(f"({letter})" for letter in self.options)
        content = [] if self.image is None else [{"type": "image"}]
        content.append({"type": "text", "text": PROMPTS[kind](self)})
        return Prompt(str(self.id), [{"role": "user", "content": content}], [] if self.image is None else [str(self.image)], letters)


def read_mmvp(folder: str | Path, patterns: str | Path | None = None, *, images: bool = True) -> list[Question]:
    """The rows of a folder, two by two.

    Args:
        folder: with `Questions.csv`. The index is its first column, whatever that is called.
        patterns: a .json {id: pattern} or a .csv of id and pattern, for files without a column Category, Pattern or Type.
        images: whether the photos are needed; finished answers are scored without.

    Raises:
        ValueError: naming what is wrong with the folder or with a row.
    """
    folder = Path(folder)
    file = folder / "Questions.csv"
    place = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if not file.is_file() or (images and place is None):
        wanted = f" and an image folder called {' or '.join(IMAGE_FOLDERS)}" if images else ""
        raise ValueError(f"{folder} is not MMVP: expected Questions.csv{wanted}")
    rows = _read_csv(file)
    header = {name.strip().lower(): position for position, name in enumerate(rows[0])} if rows else {}
    if missing := {"question", "options", "correct answer"} - header.keys():
        raise ValueError(f"{file} lacks the columns {', '.join(sorted(missing))}; it has {rows[0] if rows else 'no rows'}")
    mapping = None if patterns is None else _read_patterns(Path(patterns))
    questions = [_question(file, row, header, mapping, place if images else None) for row in rows[1:]]
    _check_pairs(file, questions)
    return questions if CORRECTION_COLUMN in header else _corrected(questions)


def _read_csv(file: Path) -> list[list[str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            return [row for row in csv.reader(stream) if any(cell.strip() for cell in row)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as CSV in UTF-8 ({error})") from None


def _read_patterns(file: Path) -> dict[str, str]:
    if file.suffix == ".json":
        try:
            mapping = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
        if not isinstance(mapping, dict) or not all(isinstance(pattern, str) for pattern in mapping.values()):
            raise ValueError(f"{file}: expected an object of ids and patterns")
        return mapping
    rows = _read_csv(file)
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
    image = None
    if images is not None:
        image = next((images / f"{id}{suffix}" for suffix in SUFFIXES if (images / f"{id}{suffix}").is_file()), None)
        if image is None:
            raise ValueError(f"{file}: row {id} has no image; expected {images / f'{id}.jpg'}")
    return Question(id, cells["question"], cells["options"], {"released": right, "corrected": label}, pattern, image)


def _check_pairs(file: Path, questions: Sequence[Question]) -> None:
    if not questions or len(questions) % 2:
        raise ValueError(f"{file} has {len(questions)} rows; rows come in pairs")
    if len({question.id for question in questions}) < len(questions):
        raise ValueError(f"{file}: an index stands twice")
    for first, second in zip(questions[0::2], questions[1::2], strict=True):
        if first.id % 2 == 0 or second.id != first.id + 1 or first.pattern != second.pattern:
            raise ValueError(
                f"{file}: rows {first.id} ({first.pattern}) and {second.id} ({second.pattern}) are no pair; expected an odd index, "
                "then the next one, of the same pattern"
            )


def _corrected(questions: Sequence[Question]) -> list[Question]:
    """With the known wrong labels corrected, unless the file's labels are not the released ones."""
    known = [question for question in questions if question.id in WRONG_LABELS]
    if not all(question.labels["released"] == WRONG_LABELS[question.id][0] for question in known):
        return list(questions)
    corrected = []
    for one in questions:
        labels = one.labels | ({"corrected": WRONG_LABELS[one.id][1]} if one.id in WRONG_LABELS else {})
        corrected.append(Question(one.id, one.question, one.options_text, labels, one.pattern, one.image))
    return corrected


MATCHES: dict[str, Callable[[Question, Answer], str | None]] = {
    "letter or text": lambda question, answer: match_answer(answer.text, question.options),
    "letter": lambda question, answer: match_letter(answer.text, question.options),
    "text": lambda question, answer: match_text(answer.text, question.options),
    "likelihood": lambda question, answer: _likeliest(question, answer),
}
"""How an answer is matched to an option's letter; the first is the one that a result is headed by."""


def _likeliest(question: Question, answer: Answer) -> str | None:
    scores = answer.log_likelihoods or ()
    best = [letter for letter, score in zip(question.options, scores, strict=False) if score == max(scores)]
    return best[0] if len(best) == 1 else None


def measure(answerer: Answerer, questions: Sequence[Question], prompt: str = "official", *, progress: bool = False) -> Score:
    """Ask and score by the first of `MATCHES` and the released labels, writing nothing; `mof.evals.run` does more."""
    prompts = [replace(question.prompt(prompt), options=()) for question in questions]  # likelihoods are not asked for
    answers, _ = answer_all(answerer, prompts, progress=progress)
    match = next(iter(MATCHES.values()))
    return score(questions, [match(q, a) == q.labels["released"] for q, a in zip(questions, answers, strict=True)])


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1]. By chance a pair is right with 0.25, a question with 0.5."""

    pair_accuracy: float
    question_accuracy: float
    by_pattern: dict[str, dict[str, float]]
    """Per pattern "pair_accuracy", "question_accuracy" and the number of "pairs"; empty where the file names no patterns."""


def score(questions: Sequence[Question], right: Sequence[bool]) -> Score:
    """Whether each question is answered rightly -> shares; questions in pairs, as `read_mmvp` gives them."""
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
