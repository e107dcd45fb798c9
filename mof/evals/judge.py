"""A language model judges answers to MMVP, as in the released grader. Its agreement with matching by rule is measured.

It has the words of the released grader (`gpt_grader.py`). It repeated its question to gpt-4-0314 at temperature 0.2 until it
got a reply, and counted everything but "yes" and "no" as wrong. Here the temperature is 0, and "Yes, it does." counts as "yes".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mof.evals.answering import Answer, Answerer, Prompt
from mof.evals.benchmark import Row
from mof.evals.option_matching import yes_or_no

if TYPE_CHECKING:
    from mof.evals.mmvp import Question
    from mof.evals.run import Run

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer. Please answer in only yes or no."
QUESTION = (
    "Given the following question {question}, the correct answer is ({label}). Does the following answer correctly answers the "
    "question, answer:{answer}?"
)


def judge_prompt(question: Question, answer: str, label: str) -> Prompt:
    """Return the prompt for the judge, without the image. The label is the right option's letter."""
    words = QUESTION.format(question=question.text, label=label, answer=answer)
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("system", SYSTEM), ("user", words))]
    return Prompt(f"{question.id}-{label}", messages, [])


def verdict(answer: Answer) -> bool | None:
    """Return True for yes, False for no, and None for every other reply, which counts as wrong."""
    return yes_or_no(answer.text)


@dataclass(frozen=True)
class Agreement:
    """Agreement says how often the judge and the rule agree on whether an answer is right, among answers with a verdict."""

    compared: int
    undecided: int
    """Number of answers without a verdict."""
    share: float | None
    kappa: float | None
    """Cohen's kappa; None if both always say the same, so that chance explains their agreement."""


def agreement(verdicts: Sequence[bool | None], by_rule: Sequence[bool]) -> Agreement:
    """Compare the verdicts with the results of the rule; both have a value per answer."""
    pairs = [(verdict, rule) for verdict, rule in zip(verdicts, by_rule, strict=True) if verdict is not None]
    count = len(pairs)
    if not count:
        return Agreement(0, len(verdicts), None, None)
    share = sum(verdict == rule for verdict, rule in pairs) / count
    judged, ruled = sum(verdict for verdict, _ in pairs) / count, sum(rule for _, rule in pairs) / count
    by_chance = judged * ruled + (1 - judged) * (1 - ruled)
    return Agreement(count, len(verdicts) - count, share, None if by_chance == 1 else (share - by_chance) / (1 - by_chance))


def judged(
    run: Run, judge: Answerer, questions: Sequence[Question], answers: Sequence[Answer], by_rule: Sequence[bool]
) -> tuple[dict[str, list[bool]], Row]:
    """Ask the judge about each answer, by the released and by the corrected labels.

    Returns:
        Labels -> whether each answer is right, and a report of the judge, with its agreement with the rule by the released labels.
    """
    kinds = list(questions[0].labels)
    prompts = [judge_prompt(q, a.final, q.labels[kind]) for kind in kinds for q, a in zip(questions, answers, strict=True)]
    replies, usage = run.ask(prompts, judge)
    verdicts = {kind: [verdict(reply) for reply in replies[i * len(questions) :][: len(questions)]] for i, kind in enumerate(kinds)}
    report = {
        "model": judge.name, "wording": "released grader", "agreement": asdict(agreement(verdicts["released"], by_rule)),
        "undecided": [q.id for q, said in zip(questions, verdicts["released"], strict=True) if said is None],
        "usage": asdict(usage),
    }  # fmt: skip
    return {kind: [said is True for said in verdicts[kind]] for kind in kinds}, report
