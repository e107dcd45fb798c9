"""The analyses of real photos: which questions are asked, and the recipe on an untrained model with photos out of the shared data."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from rich.console import Console

from encoders import build_encoder
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFProcessor
from mof.language_models import load_language_model

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/analyse_photos.py"
SHARED = ROOT.parent / "shared/data"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("analyse_photos", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_questions_by_hand(recipe: ModuleType, tmp_path: Path) -> None:
    names = ["cat", "dog", "cow"]
    found = {1: ["cat", "dog"], 2: ["dog"], 3: []}  # what is in the images
    instances = {
        "images": [{"id": id, "file_name": f"{id}.jpg"} for id in found],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": id, "category_id": names.index(name)} for id, there in found.items() for name in there],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    told = [
        {"image": "x/1.jpg", "conversations": [{"from": "human", "value": "Where is the cat: left?"}]},
        {"image": "x/2.jpg", "conversations": [{"from": "gpt", "value": "A dogfish"}]},
        {"conversations": [{"from": "gpt", "value": "dog"}]},
    ]
    questions = recipe.object_questions(tmp_path / "instances.json", tmp_path, told, np.random.default_rng(0))
    assert [one["pair"] for one in questions] == ["1.jpg", "1.jpg", "2.jpg", "2.jpg"]  # in the third is nothing
    assert [one["answer"] for one in questions] == ["Yes", "No"] * 2
    assert [one["question"].split()[3] for one in questions[:3]] == ["dog", "cow", "dog"]  # its records speak of the cat
    assert questions[3]["question"].split()[3] in ("cat", "cow")
    assert [one["false_statement"] for one in questions[:2]] == ["There is no dog in the image.", "There is a cow in the image."]
    assert questions[0]["image"] == str(tmp_path / "1.jpg")


def test_one_record_per_image(recipe: ModuleType) -> None:
    matching = [{"id": str(i), "image": image} for i, image in enumerate("abacb")]
    other = [one | {"image": "z"} for one in matching]
    found = recipe.one_per_image({"matching": matching, "conflicting": other})
    assert {name: [one["id"] for one in same] for name, same in found.items()} == {name: ["0", "1", "3"] for name in found}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the photos of ../shared/data")
def test_the_recipe_runs(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    llm, tokenizer = load_language_model("mini-lm")
    mixer = InterleavedMoF({"clip": build_encoder("mini-clip")}, hidden_size=llm.config.hidden_size)
    model = MoFForConditionalGeneration.from_parts(mixer, llm, tokenizer)
    model.save_pretrained(tmp_path / "one")
    MoFProcessor.from_parts(model, tokenizer).save_pretrained(tmp_path / "one")
    monkeypatch.setattr("sys.argv", [str(RECIPE), str(tmp_path / "one"), "--data_dir", str(SHARED), "--output", str(tmp_path / "x.json")])
    monkeypatch.setattr(recipe, "console", Console(width=100))
    recipe.main()
    figures = json.loads((tmp_path / "x.json").read_text())
    matches, misled = figures["image match"]["one"], figures["misleading text"]["one"]["misled"]
    assert matches["matching"]["vig"][1] == matches["conflicting"]["vig"][1] == figures["attention"]["one"]["records"] > 70
    assert misled["questions"] > 60 and misled["pair_accuracy"] is not None
    assert {"partly", "evenly", "misled"} <= set(capsys.readouterr().out.split())
