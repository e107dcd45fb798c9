"""Answer tokens as text: what each token adds, and the words that they make with their VIG."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vig.scoring.scores import Score

# Shapes: T = answer tokens of a record, over all its turns.

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Word:
    """A word of an answer, as it was written."""

    text: str
    vig: float
    """Sum over the tokens that hold a part of it, in nats."""


def token_texts(score: Score) -> list[str]:
    """What each token adds to the answer; joined, they are the answer. A space that is of no token goes with the one behind it.

    Of several tokens that make one character, the first has it and the others are empty.
    """
    ends = np.maximum.accumulate(score.token_ends)  # [T]
    return [score.answer[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=False)]  # nothing for no token


def turns(score: Score) -> list[NDArray[np.int64]]:
    """Indices into the answer tokens, turn by turn, with the end-of-turn token last where there is one."""
    parts = np.split(np.arange(len(score.token_ids)), score.turn_ends + 1)  # of [T]; the last is empty after an ended turn
    return [part for part in parts if len(part)]


def answer_words(score: Score) -> list[list[Word]]:
    """The words of each turn, in order. End-of-turn tokens belong to none."""
    spoken = [turn[~np.isin(turn, score.turn_ends)] for turn in turns(score)]
    return [_words(score, places) for places in spoken]


def _words(score: Score, places: NDArray[np.int64]) -> list[Word]:
    if not len(places):
        return []
    starts, ends = score.token_starts[places], score.token_ends[places]  # [T] each, of this turn
    vig = score.token_vig[places].astype(np.float64)  # [T]
    found = _WORD.finditer(score.answer, int(starts.min()), int(ends.max()))
    return [Word(match.group(), float(vig[(starts < match.end()) & (ends > match.start())].sum())) for match in found]
