import json
from collections import Counter
from dataclasses import asdict, astuple

import numpy as np
import pytest
from PIL import Image

from mof.data.records import to_record
from mof.evals.mmvp import read_mmvp
from mof.miniature import write_dataset
from mof.miniature.language import answer, options, patterns_of, question, web_caption, word, yes_or_no
from mof.miniature.scenes import COLOURS, KINDS, PATTERNS, SIZE, VALUES, habit, render, sample_burst, sample_pair, sample_scene

MMVP_TYPES = ["Orientation", "Presence", "State", "Quantity", "Spatial", "Color", "Structural Character", "Text", "Camera Perspective"]


def test_the_nine_patterns_are_spelled_as_mmvp_spells_them():
    assert list(PATTERNS) == MMVP_TYPES


def test_a_seed_draws_the_same_scene_and_picture_again():
    one, two = (np.random.default_rng(3) for _ in range(2))
    assert sample_scene(one) == (scene := sample_scene(two))
    assert np.array_equal(np.asarray(render(scene, one)), np.asarray(render(scene, two)))


def test_pictures_are_small_and_rgb():
    rng = np.random.default_rng(0)
    picture = render(sample_scene(rng), rng)
    assert picture.size == (SIZE, SIZE) and picture.mode == "RGB"


def test_training_and_held_out_scenes_never_meet():
    rng = np.random.default_rng(0)
    training = {sample_scene(rng, habit_share=0.7) for _ in range(2000)}
    held_out = {sample_scene(rng, held_out=True) for _ in range(200)}
    assert not training & held_out and all(scene.held_out() for scene in held_out)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pair_differs_in_its_field_alone_and_asks_one_question_with_two_answers(pattern):
    rng = np.random.default_rng(1)
    for _ in range(5):
        first, second = sample_pair(rng, pattern)
        assert first.held_out() and second.held_out()
        different = {name for name, value in asdict(first).items() if value != asdict(second)[name]}
        assert different == {PATTERNS[pattern]}
        words = [word(pattern, getattr(scene, PATTERNS[pattern])) for scene in (first, second)]
        asked = question(first, pattern, rng, other=words[1])
        assert words[0] != words[1] and all(name in asked for name in words)
        assert all(name in answer(scene, pattern) for name, scene in zip(words, (first, second), strict=True))


def test_the_difference_of_a_pair_is_visible():
    """Drawn with the same random numbers, the two pictures of a pair differ by more than noise somewhere."""
    rng = np.random.default_rng(2)
    for pattern in PATTERNS:
        first, second = sample_pair(rng, pattern)
        a, b = (np.asarray(render(scene, np.random.default_rng(5)), dtype=int) for scene in (first, second))
        assert np.abs(a - b).max() > 60, pattern


def test_in_a_burst_one_thing_changes_at_a_time_and_nothing_is_held_out():
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, *others = scenes = sample_burst(rng, 4)
        assert len(set(scenes)) == 4 and not any(scene.held_out() for scene in scenes)
        for other in others:
            assert sum(a != b for a, b in zip(astuple(first), astuple(other), strict=True)) == 1


def test_habits_are_followed_as_often_as_asked():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, habit_share=0.7) for _ in range(2000)]
    usual = np.mean([scene.colour == habit(scene.kind, "colour") for scene in scenes])
    assert usual == pytest.approx(0.7 + 0.3 / len(COLOURS), abs=0.04)


def test_web_captions_name_the_object_always_its_colour_half_the_time_and_nothing_else():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(1000)]
    captions = [web_caption(scene, rng) for scene in scenes]
    assert all(scene.kind in caption for scene, caption in zip(scenes, captions, strict=True))
    assert np.mean([scene.colour in caption for scene, caption in zip(scenes, captions, strict=True)]) == pytest.approx(0.5, abs=0.06)
    told = {str(value) for field, values in VALUES.items() if field not in ("kind", "colour", "letter") for value in values}
    assert not any(set(caption.split()) & told for caption in captions)


def test_every_option_answers_one_pattern_only():
    """Otherwise a description could be read for the wrong answer."""
    everything = [option for pattern in PATTERNS for option in options(pattern)]
    assert len(everything) == len(set(everything))


def test_no_sign_no_question_about_its_letter():
    rng = np.random.default_rng(0)
    scene = next(scene for scene in iter(lambda: sample_scene(rng), None) if scene.letter is None)
    assert "Text" not in patterns_of(scene) and len(patterns_of(scene)) == 8


def test_the_data_set_is_llava_records_and_balanced_pairs(tmp_path):
    write_dataset(tmp_path, align=5, finetune=20, pairs=2, seed=1)
    align, finetune = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("align", "finetune"))
    for raw in (*align, *finetune):
        to_record(raw, tmp_path / "images")  # raises for a wrong record or a missing picture
    assert sum("image" not in raw for raw in finetune) == 2
    pairs = read_mmvp(tmp_path / "MMVP")
    assert len(pairs) == 9 * 2 * 2 and all(Image.open(question.image).format == "PNG" for question in pairs)  # the renderer's pixels
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert first.question == second.question and first.options == second.options
        assert sorted(one.labels["corrected"] for one in (first, second)) == ["a", "b"]
    write_dataset(tmp_path / "again", align=5, finetune=20, pairs=2, seed=1)
    for name in ("MMVP/Questions.csv", "MMVP/MMVP Images/36.png", "align.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_yes_and_no_are_balanced_and_true():
    rng = np.random.default_rng(0)
    said = Counter()
    for scene in (sample_scene(rng) for _ in range(300)):
        for turn in yes_or_no(scene, rng):
            thing = turn.question.removeprefix("Is there a ").removesuffix(" in the image?")
            assert turn.answer == ("Yes." if thing == scene.kind or (thing == "sign" and scene.letter) else "No.")
            said[turn.word] += 1
    assert abs(said["Yes"] / 600 - 0.5) < 0.06


def test_a_tenth_of_the_records_asks_yes_or_no_whatever_the_noise(tmp_path):
    write_dataset(tmp_path, align=0, finetune=40, pairs=0, mixes={"finetune": {"swapped": 1.0}})
    truth = json.loads((tmp_path / "finetune-truth.json").read_text())
    asked = [entry for entry in truth.values() if set(entry["words"]) <= {"Yes", "No"}]
    assert len(asked) == 4 and all(entry["noise"] is None and all(entry["grounded"]) for entry in asked)


def test_there_are_eight_kinds_of_object():
    assert len(KINDS) == 8
