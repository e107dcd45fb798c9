"""Tokens as text, and the words that they make."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vig.answer_words import TokenTexts, answer_words, turns
from vig.scores import Score

BYTES = tiny.build_tokenizer()


def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece does it: a space is a mark on the word behind it, and that of the first word is dropped."""
    words = ["\u2581A", "\u2581red", "\u2581dog", "gy", "\u2581is", "."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "</s>", *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def scored(ids: list[int], vig: list[float], ends: list[int]) -> Score:
    none = float("nan")
    return Score("1", none, none, none, np.array(vig, np.float32), np.array(ids, np.int64), np.array(ends, np.int64), "")


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\ufffd"), max_size=30))
@settings(max_examples=100, deadline=None)
def test_texts_of_bytes_join_to_the_whole(text: str) -> None:
    ids = BYTES(text, add_special_tokens=False).input_ids
    pieces = TokenTexts(BYTES)(ids)
    assert len(pieces) == len(ids) == len(text.encode())
    assert "".join(pieces) == text
    expected = [char if last else "" for char in text for last in [False] * (len(char.encode()) - 1) + [True]]
    assert pieces == expected  # a character stands with its last byte


def test_any_ids_at_all() -> None:
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(len(BYTES)) for _ in range(20)]  # mostly not UTF-8
        pieces = TokenTexts(BYTES)(ids)
        assert len(pieces) == len(ids)


def test_spaces_that_a_tokenizer_drops_in_front() -> None:
    tokenizer = metaspace()
    ids = tokenizer.convert_tokens_to_ids(["\u2581A", "\u2581red", "\u2581dog", "gy", "."])
    assert TokenTexts(tokenizer)(ids) == ["A", " red", " dog", "gy", "."]
    [[a, red, doggy]] = answer_words(scored(ids, [1, 2, 4, 8, 16], []), TokenTexts(tokenizer))
    assert [(word.text, word.vig) for word in (a, red, doggy)] == [("A", 1), ("red", 2), ("doggy", 12)]


def test_turns_and_words_by_hand() -> None:
    ids = [*BYTES("Caf\u00e9", add_special_tokens=False).input_ids, BYTES.eos_token_id, *BYTES("2 x", add_special_tokens=False).input_ids]
    score = scored(ids, [1, 1, 1, 2, 3, 100, 5, 7, 9], [5])
    assert [turn.tolist() for turn in turns(score)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]  # the second was cut
    words = [[(word.text, word.vig) for word in turn] for turn in answer_words(score, TokenTexts(BYTES))]
    assert words == [[("Caf\u00e9", 8.0)], [("2", 5.0), ("x", 9.0)]]


@pytest.mark.parametrize("ends", [[], [0]])
def test_answers_without_words(ends: list[int]) -> None:
    score = scored([BYTES.eos_token_id] if ends else [], [1.0] if ends else [], ends)
    assert not any(answer_words(score, TokenTexts(BYTES)))
