"""MMVP read and scored: rules written down here, on folders made here, and on the real question file where it lies."""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path

import pytest
from PIL import Image

from mof.evals.answering import Answer
from mof.evals.mmvp import LABELS, MATCHES, Question, read_mmvp, score

HEADER = ["lndex", "Question", "Options", "Correct Answer"]


def write(folder: Path, rows: list[list[str]], header: list[str] = HEADER, images: str | None = "MMVP Images") -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    if images:
        (folder / images).mkdir(exist_ok=True)
        for row in rows:
            Image.new("RGB", (2, 2)).save(folder / images / f"{row[0]}.jpg")
    return folder


def rows(count: int) -> list[list[str]]:
    return [[str(i), f"Is it {i}?", "(a) Yes (b) No", "(a)" if i % 2 else "(b)"] for i in range(1, count + 1)]


@pytest.mark.parametrize("images", ["MMVP Images", "MMVP_Images", "MMVP Imgaes"])
def test_a_folder(tmp_path: Path, images: str) -> None:
    questions = read_mmvp(write(tmp_path, rows(4), images=images))
    assert [question.id for question in questions] == [1, 2, 3, 4]
    assert questions[1].labels == {"released": "b", "corrected": "b"}
    assert questions[1].image == tmp_path / images / "2.jpg"
    assert questions[0].pattern is None
    official, letter = questions[0].prompt("official"), questions[0].prompt("letter")
    assert official.messages[0]["content"][1]["text"] == "Is it 1? (a) Yes (b) No"
    assert letter.messages[0]["content"][1]["text"] == (
        "Is it 1? (a) Yes (b) No\nAnswer with the option's letter from the given choices directly."
    )
    assert official.images == [str(tmp_path / images / "1.jpg")] and official.options == ("(a)", "(b)")


def test_other_spellings(tmp_path: Path) -> None:
    header = ["", "CATEGORY", " question", "Options ", "Correct answer"]
    table = [["1", "od", "Up?", "(a) Up (b) Down ", " (A) "], [], ["2", "od", "Up?", "(a) Up (b) Down ", "b"]]
    questions = read_mmvp(write(tmp_path, table, header, images=None), images=False)
    assert [question.pattern for question in questions] == ["od", "od"]
    assert [question.labels["released"] for question in questions] == ["a", "b"]
    assert questions[0].text == "Up? (a) Up (b) Down" and questions[0].prompt("official").images == []


def test_patterns_out_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, rows(4))
    (tmp_path / "patterns.json").write_text('{"1": "x", "2": "x", "3": "y", "4": "y"}')
    (tmp_path / "patterns.csv").write_text("id,pattern\n1,x\n2,x\n3,y\n4,y\n")
    for name in ("patterns.json", "patterns.csv"):
        assert [question.pattern for question in read_mmvp(tmp_path, tmp_path / name)] == ["x", "x", "y", "y"]
    (tmp_path / "patterns.json").write_text('{"1": "x", "2": "z", "3": "y"}')
    with pytest.raises(ValueError, match="row 4 "):
        read_mmvp(tmp_path, tmp_path / "patterns.json")


def bad(position: int, value: str, row: int = 0) -> list[list[str]]:
    table = rows(4)
    table[row][position] = value
    return table


@pytest.mark.parametrize(
    ("table", "header", "message"),
    [
        (rows(3), HEADER, "3 rows"),
        ([], HEADER, "0 rows"),
        ([*rows(4)[1:], ["5", "?", "(a) Yes (b) No", "(a)"]], HEADER, "rows 2 .* and 3 "),
        (rows(2) * 2, HEADER, "index 1 "),
        (bad(0, "one"), HEADER, "'one'"),
        (bad(2, "Yes or no"), HEADER, "row 1: .*'Yes or no'"),
        (bad(3, "(c)"), HEADER, "row 1: .* a, b, .*'c'"),
        (bad(3, ""), HEADER, "row 1: .* ''"),
        ([row[:3] for row in rows(2)], HEADER, "3 more "),
        (rows(2), ["Index", "Question", "Choices", "Answer"], "correct answer, options"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, table: list[list[str]], header: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mmvp(write(tmp_path, table, header))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read_mmvp(tmp_path)
    write(tmp_path, rows(2), images=None)
    with pytest.raises(ValueError, match="MMVP Images"):
        read_mmvp(tmp_path)
    assert len(read_mmvp(tmp_path, images=False)) == 2
    write(tmp_path, rows(2))
    (tmp_path / "MMVP Images" / "2.jpg").unlink()
    with pytest.raises(ValueError, match=r"row 2 .*2\.jpg"):
        read_mmvp(tmp_path)
    (tmp_path / "Questions.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"Questions\.csv"):
        read_mmvp(tmp_path)


def test_the_known_wrong_labels_are_corrected(tmp_path: Path) -> None:
    questions = read_mmvp(write(tmp_path, rows(300), images=None), images=False)
    changed = {q.id: (q.labels["released"], q.labels["corrected"]) for q in questions if q.labels["released"] != q.labels["corrected"]}
    assert changed == {99: ("a", "b"), 100: ("b", "a"), 279: ("a", "b"), 280: ("b", "a")}


def test_other_questions_in_the_same_form_are_left_alone(tmp_path: Path) -> None:
    table = rows(300)
    table[98][3], table[99][3] = "(b)", "(a)"  # corrected by somebody else already, or another data set
    questions = read_mmvp(write(tmp_path, table, images=None), images=False)
    assert all(question.labels["released"] == question.labels["corrected"] for question in questions)
    table = [[*row, row[3] if row[0] != "5" else "(b)"] for row in rows(300)]
    questions = read_mmvp(write(tmp_path, table, [*HEADER, "Corrected Answer"], images=None), images=False)
    assert [q.id for q in questions if q.labels["released"] != q.labels["corrected"]] == [5]


def test_pairs_count_only_when_both_are_right() -> None:
    rng = random.Random(1)
    questions = [Question(i, "?", "(a) x (b) y", dict.fromkeys(LABELS, "a"), f"p{(i - 1) // 2 % 3}") for i in range(1, 41)]
    right = [rng.random() < 0.6 for _ in questions]
    measured = score(questions, right)
    both, single = {}, {}
    for i in range(0, 40, 2):
        pattern = questions[i].pattern
        both.setdefault(pattern, []).append(right[i] and right[i + 1])
        single.setdefault(pattern, []).extend(right[i : i + 2])
    assert measured.pair_accuracy == sum(map(sum, both.values())) / 20
    assert measured.question_accuracy == sum(right) / 40
    for pattern, each in measured.by_pattern.items():
        assert each == {
            "pair_accuracy": sum(both[pattern]) / len(both[pattern]),
            "question_accuracy": sum(single[pattern]) / len(single[pattern]),
            "pairs": len(both[pattern]),
        }
    assert measured.pair_accuracy != measured.question_accuracy


def test_likelihood() -> None:
    question = Question(1, "?", "(a) x (b) y", dict.fromkeys(LABELS, "a"))
    match = MATCHES["likelihood"]
    assert match(question, Answer("(a)", (-2.0, -1.0))) == "b"
    assert match(question, Answer("(b)", (-1.0, -2.0))) == "a"
    assert match(question, Answer("(a)", (-1.0, -1.0))) is None
    assert match(question, Answer("(a)")) is None


@pytest.mark.data
def test_the_real_questions(shared_data: Path) -> None:
    questions = read_mmvp(shared_data / "mmvp", images=False)
    assert len(questions) == 200
    assert {q.id for q in questions if q.labels["released"] != q.labels["corrected"]} == {99, 100}
    assert len({question.pattern for question in questions}) == 9
    match = MATCHES["letter or text"]
    for form in ("({letter})", "{upper}.", "{option}", "The answer is ({letter}) {option}.", "It is {option}", "({letter}) {option}"):
        for question in questions:
            letter = question.labels["released"]
            said = form.format(letter=letter, upper=letter.upper(), option=question.options[letter])
            assert match(question, Answer(said)) == letter, (question, said)
    both = [f"{question.options['a']}, or {question.options['b']}" for question in questions]
    assert all(match(q, Answer(said)) is None for q, said in zip(questions, both, strict=True))
    perfect = score(questions, [True] * 200)
    assert (perfect.pair_accuracy, perfect.question_accuracy) == (1, 1)
