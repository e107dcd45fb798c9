"""Words out of tokens, and their classes."""

from __future__ import annotations

import numpy as np
import pytest

from vig.scoring.scores import Score
from vig.word_classes import vig_by_word_class, word_classes


def scored(turns: list[str], vig_of_character: dict[str, float]) -> Score:
    """One token per character and one for the end of a turn, so a word's VIG is the sum over its characters."""
    vig: list[float] = []
    ends: list[int] = []
    starts: list[int] = []
    answer = ""
    for turn in turns:
        starts += [len(answer) + i for i in range(len(turn) + 1)]
        vig += [*(vig_of_character.get(character, 0.0) for character in turn), 100.0]
        answer += f"{turn}</s>"
        ends.append(len(vig) - 1)
    stops = [start + (4 if i in ends else 1) for i, start in enumerate(starts)]
    none, ids = float("nan"), np.zeros(len(vig), np.int64)
    return Score("1", none, none, none, np.array(vig, np.float32), ids, np.array(ends), "", answer, np.array(starts), np.array(stops))


def test_a_words_vig_is_the_sum_over_its_tokens() -> None:
    score = scored(["A red dog, two dogs."], {"r": 1.0, "e": 2.0, "d": 4.0, "w": 0.5, "A": -1.0})
    found = vig_by_word_class([score])
    assert {kind: mean[:2] for kind, mean in found.items()} == {
        "colour": (7.0, 1), "number": (0.5, 1), "object": (4.0, 2), "function": (-1.0, 1),
    }  # fmt: skip
    assert found["colour"].error is None and found["object"].error == 0


def test_turns_do_not_run_into_each_other() -> None:
    score = scored(["car", "pet is red", ""], {"c": 1.0, "d": 1.0})  # no "carpet"
    found = vig_by_word_class([score, score])
    assert {kind: mean[:2] for kind, mean in found.items()} == {"object": (1.0, 2), "function": (0.0, 2), "colour": (1.0, 2)}


def test_words_outside_the_lists_count_nowhere() -> None:
    assert vig_by_word_class([scored(["Xylophone reddish"], {"r": 1.0})]) == {}


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("green", "colour"),
        ("three", "number"),
        ("buses", "object"),
        ("dogs", "object"),
        ("left", "spatial"),
        ("the", "function"),
        ("wooden", "attribute"),
    ],
)
def test_classes(word: str, kind: str) -> None:
    assert word_classes()[word] == kind
