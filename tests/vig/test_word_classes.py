"""Words out of tokens, and their classes."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from vig.scores import Score
from vig.word_classes import vig_by_word_class, word_classes


def scored(tokenizer: PreTrainedTokenizerFast, turns: list[str], vig_of_character: dict[str, float]) -> Score:
    """The tests' tokenizer makes one token of each byte, so a word's VIG is the sum over its characters."""
    ids: list[int] = []
    vig: list[float] = []
    ends: list[int] = []
    for turn in turns:
        tokens = tokenizer(turn, add_special_tokens=False).input_ids
        assert len(tokens) == len(turn)
        ids += [*tokens, tokenizer.eos_token_id]
        vig += [*(vig_of_character.get(character, 0.0) for character in turn), 100.0]
        ends.append(len(ids) - 1)
    none = float("nan")
    return Score("1", none, none, none, np.array(vig, np.float32), np.array(ids), np.array(ends), "")


def test_a_words_vig_is_the_sum_over_its_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    score = scored(tiny_tokenizer, ["A red dog, two dogs."], {"r": 1.0, "e": 2.0, "d": 4.0, "w": 0.5, "A": -1.0})
    found = vig_by_word_class([score], tiny_tokenizer)
    assert {kind: mean[:2] for kind, mean in found.items()} == {
        "colour": (7.0, 1), "number": (0.5, 1), "object": (4.0, 2), "function": (-1.0, 1),
    }  # fmt: skip
    assert found["colour"].error is None and found["object"].error == 0


def test_turns_do_not_run_into_each_other(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    score = scored(tiny_tokenizer, ["car", "pet is red", ""], {"c": 1.0, "d": 1.0})  # no "carpet"
    found = vig_by_word_class([score, score], tiny_tokenizer)
    assert {kind: mean[:2] for kind, mean in found.items()} == {"object": (1.0, 2), "function": (0.0, 2), "colour": (1.0, 2)}


def test_words_outside_the_lists_count_nowhere(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert vig_by_word_class([scored(tiny_tokenizer, ["Xylophone reddish"], {"r": 1.0})], tiny_tokenizer) == {}


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
