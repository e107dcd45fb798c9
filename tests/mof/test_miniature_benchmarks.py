"""The benchmarks that the renderer draws, read by the evaluations and compared with what the pictures and texts show."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import mof

from encoders import build_encoder
from mof import probe_mmvp_vlm
from mof.evals.answering import Answer
from mof.evals.chair import CocoWords, read_objects, score_chair
from mof.evals.mmvp import eval_mmvp, read_mmvp
from mof.evals.mmvp_vlm import read_mmvp_vlm
from mof.evals.patterns import PATTERNS as MMVP_PATTERNS
from mof.evals.pope import STRATEGIES, read_pope
from mof.evals.run import Run
from mof.miniature import write_benchmarks
from mof.miniature.benchmarks import described_pair, objects
from mof.miniature.language import options, statement, word
from mof.miniature.scenes import KINDS, PATTERNS, VALUES, sample_pair, sample_scene

PAIRS, SCENES = 6, 60  # 54 pairs: rows 99 and 100, which MMVP's corrections are of, are among them


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "drawn"
    write_benchmarks(folder, pairs=PAIRS, scenes=SCENES)
    return folder


def test_a_statement_names_the_kind_and_the_word_of_its_pattern():
    rng = np.random.default_rng(0)
    for pattern, field in PATTERNS.items():
        first, second = sample_pair(rng, pattern)
        texts = [statement(scene, pattern) for scene in (first, second)]
        assert texts[0] != texts[1]
        for text, scene in zip(texts, (first, second), strict=True):
            said = set(text.replace(",", "").split())
            assert {scene.kind, word(pattern, getattr(scene, field))} <= said
            others = {other for name in PATTERNS if name != pattern for other in options(name)}
            assert not said & others  # a statement gives nothing else away


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_labels_of_a_pair_are_those_of_its_scenes(pattern):
    """The pair drawn by hand from the same random numbers."""
    for seed in range(5):
        pair, rng = described_pair(pattern, np.random.default_rng(seed)), np.random.default_rng(seed)
        first, second = sample_pair(rng, pattern)
        assert {name for name, value in asdict(first).items() if value != asdict(second)[name]} == {PATTERNS[pattern]}
        for scene, said, right in zip((first, second), pair.statements, pair.right, strict=True):
            assert pair.options["ab".index(right)] == word(pattern, getattr(scene, PATTERNS[pattern]))
            assert said == statement(scene, pattern)
        assert all(option in pair.question for option in pair.options) and pair.pattern == pattern


def test_mmvp_and_mmvp_vlm_are_read_as_the_official_ones(drawn):
    items, questions = read_mmvp_vlm(drawn / "MMVP_VLM"), read_mmvp(drawn / "MMVP")
    assert list(dict.fromkeys(item.type for item in items)) == list(MMVP_PATTERNS) and len(items) == 9 * PAIRS * 2
    assert (drawn / "MMVP_VLM/MLLM_VLM Images/Camera Perspective" / f"{len(items)}.jpg").is_file()
    assert (drawn / "MMVP/MMVP Images" / f"{len(questions)}.jpg").is_file()
    assert [question.pattern for question in questions] == [item.type for item in items]
    for item, question in zip(items, questions, strict=True):
        assert item.image.read_bytes() == question.image.read_bytes()
        right = question.options[question.labels["released"]]
        assert right in item.statement.replace(",", "").split() and question.labels["released"] == question.labels["corrected"]


def test_rows_99_and_100_are_not_corrected(tmp_path):
    """Whatever their labels are: in some of the drawings they are as in the released file."""
    seen = set()
    for seed in range(4):
        write_benchmarks(tmp_path / str(seed), pairs=6, scenes=1, seed=seed)
        rows = {question.id: question for question in read_mmvp(tmp_path / str(seed) / "MMVP")}
        seen.add((rows[99].labels["released"], rows[100].labels["released"]))
        assert all(row.labels["released"] == row.labels["corrected"] for row in rows.values())
    assert ("a", "b") in seen


def test_whoever_sees_everything_is_right_and_whoever_guesses_is_not(drawn, tmp_path):
    """The scores' ends: right answers, in the words of the miniature, and always the first option."""
    questions = read_mmvp(drawn / "MMVP")
    by_prompt = {question.prompt("question").id: question for question in questions}

    class Knowing:
        name, settings = "knowing", {}

        def answer(self, prompts):
            for i, prompt in enumerate(prompts):
                question = by_prompt[prompt.id]
                assert prompt.messages[0]["content"][-1]["text"] == question.question
                yield i, Answer(f"It is {self.choose(question)}.")

        def choose(self, question):
            return question.options[question.labels["released"]]

    class Guessing(Knowing):
        def choose(self, question):
            return question.options["a"]

    assert eval_mmvp(Run(tmp_path / "knowing", Knowing()), questions, "question")["pair_accuracy"] == 1
    guessed = eval_mmvp(Run(tmp_path / "guessing", Guessing()), questions, "question")
    assert (guessed["pair_accuracy"], guessed["question_accuracy"]) == (0, 0.5)
    assert list(guessed["scores"][guessed["matched_by"]]["released"]["by_pattern"]) == list(MMVP_PATTERNS)


def test_pope_asks_about_what_is_there_and_about_as_much_that_is_not(drawn):
    words = CocoWords(drawn / "CHAIR/synonyms.txt")
    there = read_objects(words, [drawn / "CHAIR/instances.json"], [])
    questions = read_pope(drawn / "POPE")
    assert {question.strategy for question in questions} == set(STRATEGIES)
    kinds = Counter()
    for question in questions:
        asked = question.text.removeprefix("Is there a ").removesuffix(" in the image?")
        assert asked in {*KINDS, "sign"} and (drawn / "images" / question.image).is_file()
        assert question.present == (asked in there[str(int(question.image.removesuffix(".jpg")))])
        kinds[question.strategy, question.present] += 1
    assert len(set(kinds.values())) == 1
    negatives = {s: [q for q in questions if q.strategy == s and not q.present] for s in STRATEGIES}
    without = {q.image for q in questions if "sign" not in there[str(int(q.image[:-4]))]}
    for strategy in ("popular", "adversarial"):  # signs are in four of five scenes, a kind is in one of eight
        assert {q.image for q in negatives[strategy] if "sign" in q.text} == without
    assert len({q.text for q in negatives["random"]}) == 9 > len({q.text for q in negatives["popular"]})


def test_chair_agrees_with_itself_and_finds_what_is_made_up(drawn):
    words = CocoWords(drawn / "CHAIR/synonyms.txt")
    instances, captions = drawn / "CHAIR/instances.json", drawn / "CHAIR/captions.json"
    by_instances, by_captions = read_objects(words, [instances], []), read_objects(words, [], [captions])
    assert by_instances == by_captions and len(by_instances) == SCENES  # a careful writer leaves nothing out
    texts = {str(one["image_id"]): one["caption"] for one in json.loads(captions.read_text())["annotations"]}
    assert score_chair(words, by_instances, texts).chair_i == 0
    missing = next(kind for kind in KINDS if kind not in by_instances["1"])
    made_up = score_chair(words, by_instances, {"1": f"A {missing} beside two balls."})
    assert (made_up.chair_i, made_up.chair_s) == (0.5, 1) and made_up.captions[0].hallucinated[0][1] == missing


def test_each_ball_is_an_instance_of_its_own(drawn):
    document = json.loads((drawn / "CHAIR/instances.json").read_text())
    names = {one["id"]: one["name"] for one in document["categories"]}
    counts = Counter((one["image_id"], names[one["category_id"]]) for one in document["annotations"])
    assert {count for (_, name), count in counts.items() if name == "ball"} == {1, 2, 3}
    assert {count for (_, name), count in counts.items() if name != "ball"} == {1}
    rng = np.random.default_rng(0)
    scene = sample_scene(rng)
    assert objects(scene)["ball"] == scene.count in VALUES["count"]


def test_a_seed_draws_the_same_again_in_jpeg_close_to_the_renderer(drawn, tmp_path):
    write_benchmarks(tmp_path / "again", pairs=PAIRS, scenes=SCENES)
    files = sorted(path.relative_to(drawn) for path in drawn.rglob("*") if path.is_file())
    assert len(files) == 9 * PAIRS * 4 + SCENES + 2 + 3 + 3
    assert all((drawn / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    picture = described_pair("Orientation", np.random.default_rng(0)).images[0]
    saved = Image.open(drawn / "MMVP/MMVP Images/1.jpg")
    assert saved.format == "JPEG" and np.abs(np.asarray(saved, dtype=int) - np.asarray(picture, dtype=int)).max() <= 8


@pytest.mark.parametrize("wrong", [{"pairs": 0}, {"scenes": 0}])
def test_what_draws_nothing_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        write_benchmarks(tmp_path / "new", **wrong)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=str(tmp_path)):
        write_benchmarks(tmp_path)


def test_the_probe_sees_what_mini_clip_was_told_and_not_what_it_was_not(drawn):
    """Its captions named colours and nothing else that a pair differs in."""
    result = probe_mmvp_vlm(build_encoder("mini-clip"), drawn / "MMVP_VLM")
    assert result.by_pattern["Color"] == max(result.by_pattern.values()) > 0.5
    images_only = probe_mmvp_vlm(build_encoder("mini-dino"), drawn / "MMVP_VLM")
    assert images_only.pairs[0].similarities is None
    assert sum(result.image_similarity.values()) > sum(images_only.image_similarity.values())


def test_the_commands_run_on_the_folders(tiny_folder, tmp_path):
    write_benchmarks(drawn := tmp_path / "drawn", pairs=1, scenes=3)
    chair = drawn / "CHAIR"
    calls = {
        "mmvp": ("--data", drawn / "MMVP", "--prompt", "question"),
        "pope": ("--data", drawn / "POPE", "--images", drawn / "images"),
        "chair": ("--instances", chair / "instances.json", "--captions", chair / "captions.json", "--synonyms", chair / "synonyms.txt",
                  "--images", drawn / "images", "--count", "2", "--prompt", "Describe the picture."),
    }  # fmt: skip
    for name, call in calls.items():
        arguments = ["eval", name, *call, "--model", tmp_path / "model", "--out", tmp_path / name, "--max-new-tokens", "2"]
        done = mof(*arguments)
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / name / "result.json").read_text())["benchmark"] == name
