import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mof import MoFProcessor
from mof.evals.pair_accuracy import answer_questions, chosen_option, pair_accuracy


def questions(*patterns):
    return [
        {"id": f"{i}{k}", "pair": str(i), "pattern": pattern, "options": ["left", "right"], "answer": answer}
        for i, pattern in enumerate(patterns)
        for k, answer in enumerate(["left", "right"])
    ]


def test_a_pair_counts_only_when_both_answers_are_right():
    asked = questions("Orientation", "Orientation", "Spatial")
    answers = ["It points left.", "It points right.", "left", "left", "nothing", "Right."]
    measured = pair_accuracy(asked, answers)
    assert measured.pair_accuracy == pytest.approx(1 / 3)
    assert measured.question_accuracy == pytest.approx(4 / 6)
    assert measured.by_pattern == {"Orientation": 0.5, "Spatial": 0.0}


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("The fish points left.", "left"),
        ("LEFT", "left"),
        ("left or right", None),
        ("", None),
        ("leftover", None),
        ("It is upright", None),
    ],
)
def test_an_answer_chooses_the_one_option_it_names(answer, option):
    assert chosen_option(answer, ["left", "right"]) == option


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_counts_agree_with_counting_by_hand(right):
    asked = questions(*["Text"] * len(right))
    other = {"left": "right", "right": "left"}
    flat = [one for both in right for one in both]
    answers = [q["answer"] if ok else other[q["answer"]] for q, ok in zip(asked, flat, strict=True)]
    measured = pair_accuracy(asked, answers)
    assert measured.pair_accuracy == sum(a and b for a, b in right) / len(right)
    assert measured.question_accuracy == sum(flat) / len(flat)


def test_unequal_numbers_and_odd_pairs_are_refused():
    asked = questions("Text")
    with pytest.raises(ValueError, match="2 questions, but 1 answers"):
        pair_accuracy(asked, ["left"])
    with pytest.raises(ValueError, match="every pair needs two questions"):
        pair_accuracy(asked[:1], ["left"])


def test_a_model_that_was_just_trained_answers_without_dropout(tiny_model, tiny_tokenizer, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    tiny_model.train()
    asked = [question | {"question": "Which way?", "image": "a.png"} for question in questions("Orientation")]
    answers = answer_questions(tiny_model, MoFProcessor.from_parts(tiny_model, tiny_tokenizer), asked, tmp_path)
    assert len(answers) == 2
    assert not any(module.training for module in tiny_model.modules())
