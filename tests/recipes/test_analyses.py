"""The analyses of the miniature and of photos: the drawn images and questions, and both recipes on an untrained model."""

import json
from pathlib import Path

import numpy as np
import pytest

import analyse_miniature
import analyse_photos
from mof.data.records import images_of
from mof.miniature.misleading import misleading_questions
from mof.miniature.scenes import PATTERNS, sample_scene
from study.run_data import one_per_image


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_as_many_facts_change_as_asked(count: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = sample_scene(rng)
        changed = analyse_miniature.with_changes(scene, count, rng)
        different = [field for field in vars(scene) if getattr(scene, field) != getattr(changed, field)]
        assert len(different) == min(count, 9 if scene.letter else 8) and "kind" not in different
        assert (changed.letter is None) == (scene.letter is None)


def test_false_statements_are_false_of_one_picture_and_true_of_the_other() -> None:
    questions = misleading_questions(2, np.random.default_rng(0))
    assert len(questions) == 2 * 2 * len(PATTERNS) and len({question["pair"] for question in questions}) == 2 * len(PATTERNS)
    for first, second in zip(questions[::2], questions[1::2], strict=True):
        assert first["question"] == second["question"] and first["answer"] != second["answer"]
        for asked, other in ((first, second), (second, first)):
            assert asked["answer"] in asked["options"] and other["answer"] in asked["false_statement"]


def test_three_pictures_for_each_description() -> None:
    groups = analyse_miniature.draw_groups(3, np.random.default_rng(0))
    for i in range(3):
        told = [groups[name][i]["conversations"] for name in ("matching", "partly matching", "conflicting")]
        assert told[0] == told[1] == told[2]
        pictures = [np.asarray(groups[name][i]["image"], dtype=float) for name in groups]
        assert all(abs(pictures[0] - other).mean() > 1 for other in pictures[1:])


def test_questions_by_hand(tmp_path: Path) -> None:
    names = ["cat", "dog", "cow"]
    shown = {1: ["cat", "dog"], 2: ["dog"], 3: []}  # the objects in the images
    instances = {
        "images": [{"id": id, "file_name": f"{id}.jpg"} for id in shown],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": id, "category_id": names.index(name)} for id, there in shown.items() for name in there],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    told = [
        {"image": "x/1.jpg", "conversations": [{"from": "human", "value": "Where is the cat: left?"}]},
        {"image": "x/2.jpg", "conversations": [{"from": "gpt", "value": "A dogfish"}]},
        {"conversations": [{"from": "gpt", "value": "dog"}]},
    ]
    questions = analyse_photos.object_questions(tmp_path / "instances.json", tmp_path, told, np.random.default_rng(0))
    assert [question["pair"] for question in questions] == ["1.jpg", "1.jpg", "2.jpg", "2.jpg"]  # in the third is nothing
    assert [question["answer"] for question in questions] == ["Yes", "No"] * 2
    assert [question["question"].split()[3] for question in questions[:3]] == ["dog", "cow", "dog"]  # its records speak of the cat
    assert questions[3]["question"].split()[3] in ("cat", "cow")
    assert [question["false_statement"] for question in questions[:2]] == ["There is no dog in the image.", "There is a cow in the image."]
    assert questions[0]["image"] == str(tmp_path / "1.jpg")


@pytest.mark.parametrize("key", ["image", "images"])
def test_one_record_per_image(key: str) -> None:
    matching = [{"id": str(i), key: image if key == "image" else [image]} for i, image in enumerate("abacb")]
    groups = {"matching": matching, "conflicting": [{"id": record["id"], "image": "z"} for record in matching]}
    kept = one_per_image(groups)
    assert {name: [record["id"] for record in records] for name, records in kept.items()} == {name: ["0", "1", "3"] for name in groups}
    assert all(images_of(record) == ["z"] for record in kept["conflicting"])


def analyse(recipe: object, arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict:
    """The recipe's figures. Its tables must hold a row of each analysis."""
    *_, output = arguments
    monkeypatch.setattr("sys.argv", ["recipe", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    recipe.main()
    assert {"partly", "evenly", "misled"} <= set(capsys.readouterr().out.split())
    return json.loads(output.read_text())


def test_the_recipe_of_the_miniature(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = analyse(analyse_miniature, [untrained, "--scenes", 3, "--pairs", 1, "--output", tmp_path / "x.json"], monkeypatch, capsys)
    assert figures["image match"]["untrained"]["conflicting"]["vig"][1] == 3
    assert figures["attention"]["untrained"]["records"] == 3 and len(figures["attention"]["untrained"]["layers"]) == 4
    assert figures["misleading text"]["untrained"]["misled"]["questions"] == 2 * len(PATTERNS)


@pytest.mark.slow
@pytest.mark.data
def test_the_recipe_of_photos(
    untrained: Path, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = analyse(analyse_photos, [untrained, "--data_dir", shared_data, "-o", tmp_path / "x.json"], monkeypatch, capsys)
    matches, misled = figures["image match"]["untrained"], figures["misleading text"]["untrained"]["misled"]
    assert matches["matching"]["vig"][1] == matches["conflicting"]["vig"][1] == figures["attention"]["untrained"]["records"] > 70
    assert misled["questions"] > 60 and misled["pair_accuracy"] is not None
