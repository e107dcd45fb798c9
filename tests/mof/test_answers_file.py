"""Finished answers in the forms that old runs left behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mof.evals.answerers import AnswersFile
from mof.evals.answering import Prompt, answer_all


def read(folder: Path, name: str, content: object) -> dict[str, str]:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return AnswersFile(file).answers


EXPECTED = {"1": "Yes, (a)", "2": "Nein"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", EXPECTED),
        ("a.json", [{"id": 1, "answer": "Yes, (a)"}, {"id": "2", "text": "Nein"}]),
        ("a.json", ["Yes, (a)", "Nein"]),
        ("a.json", {"imgToEval": {"x": {"image_id": 1, "caption": "Yes, (a)"}, "y": {"image_id": 2, "caption": "Nein"}}}),
        ("a.jsonl", '{"question_id": 1, "prompt": "?", "answer": "(b)", "response": "Yes, (a)"}\n\n{"question_id": 2, "response": "Nein"}\n'),
        ("a.jsonl", '{"question": "?", "answer": "Yes, (a)"}\n{"question": "?", "answer": "Nein"}'),
        ("a.json", '{"question": "?", "answer": "Yes, (a)"}\n{"question": "?", "answer": "Nein"}\n'),
        ("a.csv", '\ufeffindex,prediction\r\n1,"Yes, (a)"\r\n2,Nein\r\n'),
        ("A.CSV", '"text"\n"Yes, (a)"\n"Nein"\n'),
    ],
)  # fmt: skip
def test_forms(tmp_path: Path, name: str, content: object) -> None:
    assert read(tmp_path, name, content) == EXPECTED


def test_a_folder_has_a_file_for_each_part(tmp_path: Path) -> None:
    read(tmp_path, "random.json", {"1": "yes", "2": "no"})
    read(tmp_path, "popular.csv", "text\nmaybe\n")
    (tmp_path / "notes.txt").write_text("about these files")
    assert AnswersFile(tmp_path).answers == {"random/1": "yes", "random/2": "no", "popular/1": "maybe"}


def test_answers_may_hold_line_breaks_and_be_empty(tmp_path: Path) -> None:
    assert read(tmp_path, "a.csv", 'id,answer\n1,"two\nlines"\n2,""\n') == {"1": "two\nlines", "2": ""}
    assert read(tmp_path, "a.jsonl", '{"id": 1, "answer": "a\\u2028b"}\n{"id": 2, "answer": ""}') == {"1": "a\u2028b", "2": ""}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\x1e", "\n", "\r\n"])
def test_only_the_csv_module_says_where_a_row_ends(tmp_path: Path, separator: str) -> None:
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["question_id", "response"], [1, f"(a){separator}Open"], [2, "(b)"]])
    assert AnswersFile(tmp_path / "a.csv").answers == {"1": f"(a){separator}Open", "2": "(b)"}


def test_an_answer_that_is_null_costs_its_own_prompt(tmp_path: Path) -> None:
    read(tmp_path, "a.json", [{"id": 1, "caption": None}, {"id": 2, "caption": "Nein"}])
    same = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    answers, _ = answer_all(AnswersFile(tmp_path / "a.json"), [Prompt("1", same, []), Prompt("2", same, [])])
    assert [(answer.text, answer.error is None) for answer in answers] == [("", False), ("Nein", True)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[", "cannot be read as answers"),
        ("a.json", '"text"', "a list or an object"),
        ("a.json", {"1": 5}, "should be text"),
        ("a.json", [{"id": 1}], "row 1 has no answer"),
        ("a.json", [{"id": 1, "answer": "x"}, {"id": 1, "answer": "y"}], "two answers have the id 1"),
        ("a.json", [{"id": 1, "answer": "x"}, {"answer": "y"}], "row 2 has no id"),
        ("a.jsonl", "{}\n{", "cannot be read as answers"),
        ("a.csv", "id,answer\n1\n", "row 1 has no answer"),
        ("a.txt", "yes", "expected .json, .jsonl, .csv"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"a\.json"):
        AnswersFile(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"none\.json"):
        AnswersFile(tmp_path / "none.json")


def test_each_prompt_gets_the_answer_of_its_id(tmp_path: Path) -> None:
    read(tmp_path, "a.json", EXPECTED)
    same = [{"role": "user", "content": [{"type": "text", "text": "the same question"}]}]
    prompts = [Prompt("2", same, []), Prompt("1", same, [])]
    answers, _ = answer_all(AnswersFile(tmp_path / "a.json"), prompts)
    assert [answer.text for answer in answers] == ["Nein", "Yes, (a)"]
    with pytest.raises(ValueError, match=r"a\.json.* 1 of 2 .* 7; .* 1, 2"):
        answer_all(AnswersFile(tmp_path / "a.json"), [prompts[0], Prompt("7", same, [])])
