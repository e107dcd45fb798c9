"""AUROC of scores against the truth, on scores that are made up."""

import numpy as np
import pytest

from study.separation import auroc, separation
from vig import Score, Scores

rng = np.random.default_rng(0)
MANIFEST = {"identity": {}, "complete": True, "text_only": [], "failures": {}}


def test_auroc_counts_pairs():
    higher, lower = rng.integers(0, 5, 30), rng.integers(0, 4, 20)  # with ties
    by_hand = np.mean([(a > b) + 0.5 * (a == b) for a in higher for b in lower])
    assert auroc(higher, lower) == pytest.approx(by_hand)
    assert np.isnan(auroc([], [1.0]))


def score(id, answers, vig_of_words, words, loss):
    """A score with a token for each word, and the word's VIG where it decides an answer."""
    text, starts, ends, values, place = "".join(f"{answer}<end>" for answer in answers), [], [], [], 0
    for answer, word, value in zip(answers, words, vig_of_words, strict=True):
        for piece in answer.removesuffix(".").split(" "):
            place = text.index(piece, place)
            starts.append(place)
            ends.append(place + len(piece))
            values.append(value if piece == word else 0.0)
            place += len(piece)
    token_vig = np.array(values, np.float32)
    fields = {"token_ids": np.zeros(len(values), np.int64), "turn_ends": np.empty(0, np.int64), "digest": ""}
    return Score(
        id,
        float(token_vig.mean()),
        loss,
        loss + 1,
        token_vig,
        answer=text,
        token_starts=np.array(starts),
        token_ends=np.array(ends),
        **fields,
    )


def record(id, answers):
    return {
        "id": id,
        "conversations": [{"from": who, "value": text} for answer in answers for who, text in (("human", "?"), ("gpt", answer))],
    }


def test_each_kind_is_compared_with_what_the_picture_decides():
    answers, words = ["It is red.", "It is plain."], ["red", "plain"]
    wrapped = ["So: It is red. Done.", "So: It is plain. Done."]
    rows = [  # id, noise, answers, grounded, VIG of the deciding words, loss
        ("a", None, answers, [True, True], [2.0, 3.0], 1.0),
        ("b", "swapped", answers, [False, False], [1.0, 2.5], 2.0),
        ("c", "span", answers, [True, False], [2.0, -1.0], 1.0),
        ("d", "boilerplate", wrapped, [True, True], [2.0, 1.0], 3.0),
    ]
    scores = [
        score(id, said, values, words if kind != "boilerplate" else ["red.", "plain."], loss) for id, kind, said, _, values, loss in rows
    ]
    records = [record(id, said) for id, _, said, *_ in rows]
    truth = {id: {"noise": kind, "words": words, "grounded": grounded} for id, kind, _, grounded, *_ in rows}
    table = separation(Scores(scores, MANIFEST), records, truth)
    assert list(table) == ["swapped", "span", "boilerplate"]
    assert table["swapped"] == {"vig": 1.0, "lowest loss": 1.0, "highest null loss": 0.0, "token vig": 0.75}
    assert table["span"]["token vig"] == 1.0 and table["span"]["lowest loss"] == 0.5
    assert table["boilerplate"]["token vig"] == 1.0

    more = separation(Scores(scores, MANIFEST), records, truth, ["vig", "vic", "vppo"])
    assert all(more[kind].items() >= figures.items() for kind, figures in table.items())
    assert more["swapped"].keys() - table["swapped"].keys() == {"vic", "vppo", "shuffled vig", "token vppo"}  # vic is of records only
    assert more["span"]["token vppo"] == 1.0  # exp(-2) + 2 - 1 of "red" is above exp(1) - 1 - 1 of "plain"


def test_turns_that_were_cut_at_the_longest_length_are_left_out():
    answers, words = ["It is red.", "It is plain."], ["red", "plain"]
    scores = [score("a", answers[:1], [2.0], words[:1], 1.0), score("b", answers, [1.0, 3.0], words, 1.0)]
    truth = {id: {"noise": noise, "words": words, "grounded": [noise is None] * 2} for id, noise in (("a", None), ("b", "swapped"))}
    table = separation(Scores(scores, MANIFEST), [record(id, answers) for id in "ab"], truth)
    assert table["swapped"]["token vig"] == 0.5  # 2 against 1 and 3


def test_records_whose_truth_names_no_words_are_compared_whole():
    scores = [score(id, ["It is red."], [value], ["red"], 1.0) for id, value in (("a", 2.0), ("b", 1.0))]
    truth = {"a": {"noise": None}, "b": {"noise": "swapped"}}
    table = separation(Scores(scores, MANIFEST), [record(id, ["It is red."]) for id in "ab"], truth)
    assert table == {"swapped": {"vig": 1.0, "lowest loss": 0.5, "highest null loss": 0.5}}


def test_without_the_truth_there_is_nothing_to_compare():
    assert separation(Scores([], MANIFEST), [], {}) == {}
