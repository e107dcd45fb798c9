"""Tokens as text, the words that they make, and the kinds of words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vig import score
from vig.scoring.score_table import Score
from vig.words import Mean, answer_words, parts_of_speech, token_texts, turns, vig_by_word_class, word_class


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


# --- kinds of words
def spelled(turns: list[str], vig_of_character: dict[str, float]) -> Score:
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
    score = spelled(["A red dog, two dogs."], {"r": 1.0, "e": 2.0, "d": 4.0, "w": 0.5, "A": -1.0})
    found = vig_by_word_class([score])
    assert {kind: mean[:2] for kind, mean in found.items()} == {
        "colour": (7.0, 1), "number": (0.5, 1), "object": (4.0, 2), "function": (-1.0, 1),
    }  # fmt: skip
    assert found["colour"].error is None and found["object"].error == 0


def test_turns_do_not_run_into_each_other() -> None:
    score = spelled(["car", "pet is red", ""], {"c": 1.0, "d": 1.0})  # no "carpet"
    found = vig_by_word_class([score, score])
    assert {kind: mean[:2] for kind, mean in found.items()} == {"object": (1.0, 2), "function": (0.0, 2), "colour": (1.0, 2)}


def test_words_outside_the_lists_count_nowhere() -> None:
    assert vig_by_word_class([spelled(["Xylophone reddish"], {"r": 1.0})]) == {}


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("green", "colour"),
        ("three", "number"),
        ("12", "number"),
        ("Red", "colour"),
        ("xylophone", None),
        ("buses", "object"),
        ("dogs", "object"),
        ("left", "spatial"),
        ("the", "function"),
        ("wooden", "attribute"),
    ],
)
def test_classes(word: str, kind: str | None) -> None:
    assert word_class(word) == kind


def test_parts_of_speech() -> None:
    pytest.importorskip("textblob")
    words = ["A", "small", "dog", "quickly", "ran", "over", "two", "bridges", "and", "it", "barked"]
    tags = ["determiner", "adjective", "noun", "adverb", "verb", "preposition", "number", "noun", "conjunction", "pronoun", "verb"]
    assert parts_of_speech(words) == tags
    assert parts_of_speech([]) == []


@given(st.lists(st.from_regex(r"\A\w+\Z"), max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_word_has_a_part_of_speech_or_none(words: list[str]) -> None:
    pytest.importorskip("textblob")
    assert len(parts_of_speech(words)) == len(words)


def test_means() -> None:
    mean = Mean.of([1.0, 2.0, 6.0])
    assert mean == pytest.approx((3.0, 3, np.sqrt(7 / 3)))  # variance (4 + 1 + 9) / 2
    assert mean.interval == pytest.approx((3 - 1.96 * np.sqrt(7 / 3), 3 + 1.96 * np.sqrt(7 / 3)))
    assert Mean.of([5.0]) == (5.0, 1, None) and Mean.of([5.0]).interval is None
