"""Kinds of noise: what is false or needless is marked, everything else is as without noise."""

import json

import numpy as np
import pytest

from mof.miniature import write_dataset
from mof.miniature.language import answer, facts, word
from mof.miniature.noise import KINDS, draw_kind
from mof.miniature.scenes import PATTERNS, habit, sample_scene


def turns(kind, count=200):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        yield scene, KINDS[kind](scene, rng)


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_ends_a_sentence_of_its_answer(kind):
    assert all(f" {turn.word}." in turn.answer for _, both in turns(kind) for turn in both)


@pytest.mark.parametrize("kind", ["span", "guessable", "boilerplate"])
def test_grounded_words_are_true(kind):
    for scene, both in turns(kind):
        assert all(turn.word == word(turn.pattern, getattr(scene, PATTERNS[turn.pattern])) for turn in both if turn.grounded)


def test_span_has_a_single_false_word():
    for scene, both in turns("span"):
        (false,) = [turn for turn in both if not turn.grounded]
        assert false.answer != answer(scene, false.pattern) and false.word in false.question


@pytest.mark.parametrize("kind", ["ungrounded", "plausible"])
def test_what_is_usual_is_claimed_nine_times_of_ten(kind):
    usual = [turn.word == word(turn.pattern, habit(scene.kind, PATTERNS[turn.pattern])) for scene, both in turns(kind) for turn in both]
    assert 0.88 < np.mean(usual) < 0.97
    assert not any(turn.grounded for _, both in turns(kind) for turn in both)


def test_a_guessable_question_states_its_answer_and_boilerplate_keeps_it():
    assert all(turn.question.startswith(turn.answer) for _, both in turns("guessable") for turn in both)
    assert all(turn.word in facts(scene) and turn.grounded for scene, both in turns("boilerplate") for turn in both)


def test_a_swapped_record_is_about_another_scene():
    right = [turn.answer == answer(scene, turn.pattern) for scene, both in turns("swapped") for turn in both if turn.pattern != "Text"]
    assert 0.2 < np.mean(right) < 0.5  # by chance


def test_kinds_are_drawn_with_their_shares():
    rng = np.random.default_rng(0)
    kinds = [draw_kind({"span": 0.3, "swapped": 0.1}, rng) for _ in range(4000)]
    assert [kinds.count(kind) / 4000 for kind in ("span", "swapped", None)] == pytest.approx([0.3, 0.1, 0.6], abs=0.03)


@pytest.mark.parametrize("shares", [{"typo": 0.1}, {"span": 0.7, "swapped": 0.4}, {"span": -0.1}])
def test_wrong_shares_are_refused(shares, tmp_path):
    with pytest.raises(ValueError, match=next(iter(shares))):
        write_dataset(tmp_path, align=0, finetune=1, pairs=0, mixes={"finetune": shares})


def test_noise_changes_only_its_own_records(tmp_path):
    """The noise of a low share is among that of a higher share, and the pictures are those without noise."""
    mixes = {"clean": {}, "low": {"ungrounded": 0.3}, "high": {"ungrounded": 0.6}}
    write_dataset(tmp_path, align=0, finetune=40, pairs=1, mixes=mixes)
    clean, low, high = (json.loads((tmp_path / f"{name}.json").read_text()) for name in mixes)
    truths = [json.loads((tmp_path / f"{name}-truth.json").read_text()) for name in mixes]
    noisy = [{id for id, entry in truth.items() if entry["noise"]} for truth in truths]
    assert noisy[0] == set() < noisy[1] < noisy[2]
    assert all((a == b) == (a["id"] not in noisy[1]) for a, b in zip(clean, low, strict=True))
    assert all(a == b for a, b in zip(low, high, strict=True) if a["id"] in noisy[1])
    assert [record.get("image") for record in clean] == [record.get("image") for record in high]
    assert all("image" in record for record in high if record["id"] in noisy[2])
