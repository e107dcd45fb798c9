"""Answer tokens as text: what each token adds, and the words that they make with their VIG."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vig.scores import Score

# Shapes: T = answer tokens of a record, over all its turns.

_INCOMPLETE = "\ufffd"  # what tokenizers write for a character of which some bytes are still missing


@dataclass(frozen=True, slots=True)
class Word:
    """A word of an answer, as it was written."""

    text: str
    vig: float
    """Sum over the tokens that hold a part of it, in nats."""


class TokenTexts:
    """What each token of a sequence adds to the text: no tokenizer gives offsets for ids.

    Args:
        tokenizer: of transformers; the one that the scores were made with.
    """

    def __init__(self, tokenizer: Any) -> None:
        # Texts repeat themselves: almost every pair of neighbours has been decoded before.
        self._decode = functools.lru_cache(2**17)(lambda ids: tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """One text per id; joined, they are the decoded sequence. A character of several tokens stands with the last of them.

        A token is decoded behind the one before it, as some tokenizers drop the white space that a text begins with.
        """
        ids = tuple(int(id) for id in ids)
        texts, before, start = [], 0, 0  # ids[before:start] are context, ids[start:end] new
        for end in range(1, len(ids) + 1):
            context, whole = self._decode(ids[before:start]), self._decode(ids[before:end])
            if whole.endswith(_INCOMPLETE) and end < len(ids):
                texts.append("")
            else:
                texts.append(whole[len(context) :])
                before, start = start, end
        return texts


def turns(score: Score) -> list[NDArray[np.int64]]:
    """Indices into the answer tokens, turn by turn, with the end-of-turn token last where there is one."""
    parts = np.split(np.arange(len(score.token_ids)), score.turn_ends + 1)  # of [T]; the last is empty after an ended turn
    return [part for part in parts if len(part)]


def answer_words(score: Score, token_texts: TokenTexts) -> list[list[Word]]:
    """The words of each turn, in order. End-of-turn tokens belong to none."""
    return [_words(score, [int(i) for i in turn if i not in score.turn_ends], token_texts) for turn in turns(score)]


def _words(score: Score, places: Sequence[int], token_texts: TokenTexts) -> list[Word]:
    texts = token_texts([score.token_ids[place] for place in places])
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)  # [T]
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends  # [T]
    vig = score.token_vig[places].astype(np.float64)  # [T]
    words = []
    for match in re.finditer(r"\w+", "".join(texts)):
        # one that adds nothing is the first part of the character that comes next
        inside = (starts < match.end()) & ((ends > match.start()) | ((starts == ends) & (starts >= match.start())))  # [T]
        words.append(Word(match.group(), float(vig[inside].sum())))
    return words
