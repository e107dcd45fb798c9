"""AnswersFile takes finished answers from a file, of any model and any old run."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from encoders.text_files import parse_json, read_regular
from mof.evals.answering import Answer, Prompt

SUFFIXES = (".json", ".jsonl", ".csv")
IDS = ("id", "question_id", "image_id", "index")
"""Names of a row's id, in the order in which they are looked for."""
TEXTS = ("response", "text", "caption", "prediction", "answer")
"""Names of a row's answer, in that order. "answer" is last: in files of the released MMVP script it is the right answer."""


class AnswersFile:
    """AnswersFile gives the finished answer with the id of the prompt.

    It reads `.json` (a list of rows, {id: answer}, or {"imgToEval": {id: row}} as in CHAIR's files), `.jsonl` and `.csv` (a row per
    answer, with names of `IDS` and `TEXTS`). Rows without ids are numbered from 1. If `file` is a folder, all these files in it are
    read, and ids begin with the file's name: "random/17" is the answer 17 of `random.jsonl`.

    An answer that is null costs its own prompt only.

    Raises:
        ValueError: for a file that is none of these, a row without an answer, or two answers to one prompt.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.name = self.file.stem
        self.answers: dict[str, str | None] = {}
        digest = hashlib.sha256()
        files = sorted(path for path in self.file.iterdir() if path.suffix.lower() in SUFFIXES) if self.file.is_dir() else [self.file]
        for path in files:
            answers, content = _read(path)
            digest.update(content)
            prefix = f"{path.stem}/" if self.file.is_dir() else ""
            self.answers |= {prefix + id: text for id, text in answers.items()}
        if not self.answers:
            raise ValueError(f"{self.file} holds no answers: expected rows in {', '.join(SUFFIXES)}, or a folder of these files")
        self.settings: dict[str, Any] = {"kind": "answers file", "sha256": digest.hexdigest()}

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        missing = [prompt.id for prompt in prompts if prompt.id not in self.answers]
        if missing:
            raise ValueError(
                f"{self.file} lacks the answers to {len(missing)} of {len(prompts)} prompts, such as {', '.join(missing[:5])}; its ids "
                f"are like {', '.join(list(self.answers)[:5])}"
            )
        for position, prompt in enumerate(prompts):
            text = self.answers[prompt.id]
            yield position, Answer(text or "", error=f"{self.file} holds null" if text is None else None)


def _read(file: Path) -> tuple[dict[str, str | None], bytes]:
    """Return the answers and the file's content."""
    try:
        content = read_regular(file)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); expected a file of answers, {', '.join(SUFFIXES)}") from None
    try:
        rows = _read_rows(content.decode("utf-8-sig"), file.suffix.lower())
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file}: cannot be read as answers ({error})") from None
    answers = rows if isinstance(rows, dict) else _by_id(rows, str(file))
    if wrong := [id for id, text in answers.items() if not isinstance(text, str | None)]:
        raise ValueError(f"{file}: answers should be text; {wrong[0]} has {answers[wrong[0]]!r}")
    return answers, content


def _read_rows(text: str, suffix: str) -> list[Any] | dict[str, Any]:
    if suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names = [name for name in rows.fieldnames or [] if name]  # spreadsheets write empty columns behind the others
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have the same name: {', '.join(names)}")
        found = list(rows)
        if long := [number for number, row in enumerate(found, start=1) if any(row.get(None, []))]:  # type: ignore[call-overload]
            raise ValueError(f"row {long[0]} has more cells than the {len(names)} columns: put quotes around an answer with a comma")
        return [{name: cell for name, cell in row.items() if cell is not None} for row in found]
    if suffix not in SUFFIXES:
        raise ValueError(f"{suffix or 'no suffix'}; expected {', '.join(SUFFIXES)}")
    lines = [line for line in text.split("\n") if line.strip()]
    if suffix == ".jsonl" or (len(lines) > 1 and all(line.startswith("{") and line.rstrip().endswith("}") for line in lines)):
        return [parse_json(line, f"line {number}") for number, line in enumerate(lines, 1)]  # POPE's files are called .json, too
    document = parse_json(text, "the file", unique=True)
    if isinstance(document, dict) and isinstance(document.get("imgToEval"), dict):
        return list(document["imgToEval"].values())
    if not isinstance(document, (list, dict)):
        raise ValueError(f"expected a list or an object, got a {type(document).__name__}")
    return document


def _by_id(rows: Sequence[Any], where: str) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    with_id = [isinstance(row, dict) and _find(row, IDS) is not None for row in rows]
    if any(with_id) and not all(with_id):
        raise ValueError(f"{where}: row {with_id.index(False) + 1} has no id, others have; expected one of {', '.join(IDS)} in each")
    for number, row in enumerate(rows, start=1):
        text = _find(row, TEXTS) if isinstance(row, dict) else row
        if text is None and not (isinstance(row, dict) and set(TEXTS) & row.keys()):
            raise ValueError(f"{where}: row {number} has no answer; expected one of {', '.join(TEXTS)}, got {row!r}")
        id = str(_find(row, IDS)) if with_id[number - 1] else str(number)
        if id in answers:
            raise ValueError(f"{where}: two answers have the id {id}")
        answers[id] = text
    return answers


def _find(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
