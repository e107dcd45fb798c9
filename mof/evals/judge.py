"""A language model as judge of answers to MMVP, as in the released grader, and how far it agrees with matching by rule.

The words are those of the released grader (`gpt_grader.py`). It asked gpt-4-0314 at temperature 0.2 for as long as it took,
and took anything but "yes" and "no" for wrong. Here the temperature is 0, and "Yes." counts as "yes".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mof.evals.answering import Answer, Prompt
from mof.evals.mmvp import Question

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer. Please answer in only yes or no."
QUESTION = (
    "Given the following question {question}, the correct answer is ({label}). Does the following answer correctly answers the "
    "question, answer:{answer}?"
)
_VERDICT = re.compile(r"\W*(yes|no)\W*", re.IGNORECASE)


def judge_prompt(question: Question, answer: str, label: str) -> Prompt:
    """What the judge is asked: without the image. Label: the right option's letter."""
    words = QUESTION.format(question=question.text, label=label, answer=answer)
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("system", SYSTEM), ("user", words))]
    return Prompt(f"{question.id}-{label}", messages, [])


def verdict(answer: Answer) -> bool | None:
    """Yes or no; None for anything else, which counts as wrong."""
    found = _VERDICT.fullmatch(answer.text)
    return None if found is None else found[1].lower() == "yes"


@dataclass(frozen=True)
class Agreement:
    """Between the judge and the rule on which answers are right, where the judge said yes or no."""

    compared: int
    undecided: int
    """Answers on which the judge said neither."""
    share: float | None
    kappa: float | None
    """Cohen's; None where both always say the same one thing, so that chance explains it all."""


def agreement(verdicts: Sequence[bool | None], by_rule: Sequence[bool]) -> Agreement:
    """One verdict and one result of the rule per answer."""
    pairs = [(verdict, rule) for verdict, rule in zip(verdicts, by_rule, strict=True) if verdict is not None]
    count = len(pairs)
    if not count:
        return Agreement(0, len(verdicts), None, None)
    share = sum(verdict == rule for verdict, rule in pairs) / count
    judged, ruled = sum(verdict for verdict, _ in pairs) / count, sum(rule for _, rule in pairs) / count
    by_chance = judged * ruled + (1 - judged) * (1 - ruled)
    return Agreement(count, len(verdicts) - count, share, None if by_chance == 1 else (share - by_chance) / (1 - by_chance))
