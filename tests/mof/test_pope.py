"""POPE's released rule, case by case, and its figures against those worked out by hand."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from mof.evals.answerers import AnswersFile
from mof.evals.pope import PopeQuestion, eval_pope, read_pope, says_neither, says_no_unread, says_yes, score_pope
from mof.evals.run import Run


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", True),
        ("Yes, there is a dog.", True),
        ("No", False),
        ("no", False),
        ("No, there is no dog.", False),
        ("There is no dog", False),
        ("There is not a dog in the image.", False),
        ("The image does, not, show it", False),
        ("Yes. But no cat.", True),  # only the first sentence
        ("I see a dog. No", True),
        ("No. Yes", False),
        ("Not sure", True),  # "Not" is none of the words
        ("NO", True),
        ("no!", True),
        ("No\nthere is none", True),  # split at spaces only
        ("There isn't any", True),
        ("Nothing", True),
        ("another", True),
        ("", True),
        (".no", True),
    ],
)
def test_the_released_rule(answer: str, expected: bool) -> None:
    assert says_yes(answer) is expected


def test_answers_without_yes_and_no_and_noes_that_the_rule_does_not_read() -> None:
    assert [answer for answer in ("Yes", "no.", "There is not", "two dogs", "", "There isn't any", "another") if says_neither(answer)] == [
        "two dogs", "", "There isn't any", "another"
    ]  # fmt: skip
    assert [answer for answer in ("No", "NO", "no!", "**No**", "No\nDog", "Yes no!", "A dog. No", "Nothing") if says_no_unread(answer)] == [
        "NO", "no!", "**No**", "No\nDog"
    ]  # fmt: skip


def questions(strategy: str, labels: str) -> list[PopeQuestion]:
    return [PopeQuestion(f"{strategy}/{i}", strategy, "x.jpg", "?", label == "y") for i, label in enumerate(labels, start=1)]


@pytest.mark.parametrize(("replies", "chance"), [(["Yes"] * 40, True), (["Yes", "No"] * 20, False), (["Yes", "No", "No"] * 14, True)])
def test_a_model_at_chance_is_said_to_be_at_chance(tmp_path: Path, replies: list[str], chance: bool) -> None:
    asked = [PopeQuestion(f"random/{i}", "random", f"{i // 2}.jpg", "?", i % 2 == 0) for i in range(40)]
    (tmp_path / "answers.json").write_text(
        json.dumps({q.id: f"<think>No.</think>{reply}" for q, reply in zip(asked, replies, strict=False)})
    )
    result = eval_pope(Run(tmp_path / "out", AnswersFile(tmp_path / "answers.json")), asked, None)
    assert result["yes_ratio"] == pytest.approx(sum(reply == "Yes" for reply in replies[:40]) / 40)  # not the thoughts
    assert any("not above chance (50%)" in note for note in result["deviations"]) is chance
    assert any("40 answers hold thoughts" in note for note in result["deviations"])


def test_figures_by_hand() -> None:
    asked = questions("random", "yyyynnnn") + questions("popular", "yn")
    answers = ["Yes", "Yes", "Yes", "No", "Yes", "No", "No", "No", "Yes", "Yes"]
    scores = score_pope(asked, answers)
    first = scores["random"]  # 3 hits, 1 false alarm, 1 miss, 3 right noes
    assert first == {"accuracy": 0.75, "precision": 0.75, "recall": 0.75, "f1": 0.75, "yes_ratio": 0.5, "questions": 8}
    second = scores["popular"]  # 1 hit, 1 false alarm
    assert (second["accuracy"], second["precision"], second["recall"], second["yes_ratio"]) == (0.5, 0.5, 1, 1)
    assert second["f1"] == pytest.approx(2 / 3)
    mean = scores["mean"]
    assert (mean["accuracy"], mean["precision"], mean["recall"], mean["yes_ratio"], mean["questions"]) == (0.625, 0.625, 0.875, 0.75, 10)
    assert mean["f1"] == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_one_sided_answers_have_figures_too() -> None:
    never = score_pope(questions("random", "yynn"), ["no"] * 4)["random"]
    assert never == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0, "questions": 4}
    always = score_pope(questions("random", "nn"), ["yes"] * 2)["random"]
    assert always == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 1, "questions": 2}


def line(**changes: object) -> str:
    return json.dumps({"question_id": 1, "image": "x.jpg", "text": "Is there a dog?", "label": "yes"} | changes)


@pytest.mark.parametrize(
    "content", ["{", "[]", line(label="maybe"), line() + "\n" + line(), line() + "\n" + line(question_id="1"), '{"question_id": 1}']
)
def test_bad_lines_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "coco_pope_random.json").write_text(content)
    with pytest.raises(ValueError, match=r"coco_pope_random.json, line [12]"):
        read_pope(tmp_path)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read_pope(tmp_path)
    (tmp_path / "coco_pope_popular.json").write_text(line(), encoding="utf-8-sig")  # as Windows programs save it
    assert len(read_pope(tmp_path)) == 1
    (tmp_path / "coco_pope_popular.json").unlink()
    for strategy in ("adversarial", "random"):
        (tmp_path / f"coco_pope_{strategy}.json").write_text(line() + "\n" + line(question_id=2, label="no") + "\n\n")
    assert [(q.id, q.present) for q in read_pope(tmp_path)] == [
        ("random/1", True), ("random/2", False), ("adversarial/1", True), ("adversarial/2", False),
    ]  # fmt: skip
    (tmp_path / "gqa_pope_random.json").write_text(line())
    with pytest.raises(ValueError, match=r"coco_pope_random\.json, gqa_pope_random\.json"):
        read_pope(tmp_path)


@pytest.mark.data
def test_the_real_questions(shared_data: Path) -> None:
    asked = read_pope(shared_data / "pope")
    assert len(asked) == 6000 and sum(question.present for question in asked) == 3000
    rng = random.Random(0)
    said = [rng.random() < 0.7 for _ in asked]
    scores = score_pope(asked, ["Yes, there is." if yes else "No, there is no such thing." for yes in said])
    for strategy in ("random", "popular"):
        pairs = [(yes, q.present) for q, yes in zip(asked, said, strict=True) if q.strategy == strategy]
        hits, alarms, misses = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
        assert scores[strategy]["precision"] == pytest.approx(hits / (hits + alarms))
        assert scores[strategy]["recall"] == pytest.approx(hits / (hits + misses))
        assert scores[strategy]["f1"] == pytest.approx(hits / (hits + (alarms + misses) / 2))
