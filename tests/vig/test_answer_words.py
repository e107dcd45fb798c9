"""Tokens as text, and the words that they make."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vig import score
from vig.answer_words import answer_words, token_texts, turns
from vig.scoring.scores import Score


def scored(answer: str, spans: list[tuple[int, int]], vig: list[float], ends: list[int]) -> Score:
    none, ids = float("nan"), np.arange(len(spans))
    starts, stops = np.array(spans, np.int64).reshape(-1, 2).T  # [T], [T]
    return Score("1", none, none, none, np.array(vig, np.float32), ids, np.array(ends, np.int64), "", answer, starts, stops)


def words(one: Score) -> list[list[tuple[str, float]]]:
    return [[(word.text, word.vig) for word in turn] for turn in answer_words(one)]


def test_spaces_before_words_belong_to_them_or_to_nobody() -> None:
    for spans in ([(0, 1), (1, 5), (5, 9), (9, 11), (11, 12)], [(0, 1), (2, 5), (6, 9), (9, 11), (11, 12)]):
        one = scored("A red doggy.", spans, [1, 2, 4, 8, 16], [])
        assert token_texts(one) == ["A", " red", " dog", "gy", "."]
        assert words(one) == [[("A", 1), ("red", 2), ("doggy", 12)]]


def test_a_character_of_several_tokens() -> None:
    one = scored("Caf\u00e9s \U0001f600", [(0, 3), (3, 4), (3, 4), (4, 5), (5, 7), (6, 7), (6, 7)], [1, 2, 4, 8, 16, 32, 64], [])
    assert token_texts(one) == ["Caf", "\u00e9", "", "s", " \U0001f600", "", ""]
    assert words(one) == [[("Caf\u00e9s", 15)]]


def test_turns_by_hand() -> None:
    """The end mark holds letters, and no space parts the turns."""
    one = scored("car</s>pet 2", [(0, 3), (3, 7), (7, 10), (10, 12)], [1, 100, 2, 4], [1])
    assert [turn.tolist() for turn in turns(one)] == [[0, 1], [2, 3]]  # the second was cut
    assert words(one) == [[("car", 1)], [("pet", 2), ("2", 4)]]


@pytest.mark.parametrize("ends", [[], [0]])
def test_answers_without_words(ends: list[int]) -> None:
    one = scored("</s>" if ends else "", [(0, 4)] if ends else [], [1.0] if ends else [], ends)
    assert token_texts(one) == (["</s>"] if ends else [])
    assert not any(answer_words(one))


def test_of_real_scores(llava: tuple[LlavaForConditionalGeneration, LlavaProcessor], records: list, image_folder) -> None:
    for one, record in zip(score(*llava, records, image_folder=image_folder), records, strict=True):
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        texts = token_texts(one)
        assert ["".join(texts[i] for i in turn).strip() for turn in turns(one)] == [f"{answer}</s>" for answer in answers]
        found = [[word.text for word in turn] for turn in answer_words(one)]
        assert found == [answer.replace(",", "").replace(".", "").replace("?", "").split() for answer in answers]
