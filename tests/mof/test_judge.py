"""The judge's verdicts, and kappa against figures worked out by hand."""

from __future__ import annotations

import pytest

from mof.evals.answering import Answer
from mof.evals.judge import agreement, judge_prompt, verdict
from mof.evals.mmvp import Question


def test_the_released_words() -> None:
    question = Question(7, "Is it up?", "(a) Yes (b) No", {"released": "a", "corrected": "b"})
    prompt = judge_prompt(question, "Yes, {it} is", "a")
    system, user = (message["content"][0]["text"] for message in prompt.messages)
    assert [message["role"] for message in prompt.messages] == ["system", "user"] and prompt.images == []
    assert system == ("You are a helpful and precise assistant for checking the quality of the answer. Please answer in only yes or no.")
    assert user == (
        "Given the following question Is it up? (a) Yes (b) No, the correct answer is (a). Does the following answer correctly "
        "answers the question, answer:Yes, {it} is?"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", True),
        ("Yes.", True),
        ("**Yes**, it does.", True),
        (" NO\n", False),
        ('"no"', False),
        ("yes and no", None),
        ("I think yes", True),
        ("perhaps yes", None),
        ("", None),
        ("nope", None),
    ],
)
def test_verdicts(text: str, expected: bool | None) -> None:
    assert verdict(Answer(text)) is expected


def test_agreement_by_hand() -> None:
    # the textbook table: both yes 20, judge only 5, rule only 10, both no 15: share 0.7, by chance 0.5, kappa 0.4
    verdicts = [True] * 25 + [False] * 25
    by_rule = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    compared_answers = agreement([*verdicts, None, None], [*by_rule, True, False])
    assert (compared_answers.compared, compared_answers.undecided, compared_answers.share) == (50, 2, 0.7)
    assert compared_answers.kappa == pytest.approx(0.4)
    assert agreement([True, False], [True, False]).kappa == 1
    assert agreement([True, False], [False, True]).kappa == -1
    same = agreement([True, True], [True, True])
    assert (same.share, same.kappa) == (1, None)
    nothing = agreement([None], [True])
    assert (nothing.compared, nothing.undecided, nothing.share, nothing.kappa) == (0, 1, None, None)
