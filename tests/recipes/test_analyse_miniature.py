"""The analyses of the miniature: what is drawn, and the recipe on an untrained model."""

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
from mof.miniature.misleading import misleading_questions
from mof.miniature.scenes import PATTERNS, sample_scene

RECIPE = Path(__file__).parents[2] / "recipes/analyse_miniature.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("analyse_miniature", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_as_many_facts_change_as_asked(recipe: ModuleType, count: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = sample_scene(rng)
        changed = recipe.with_changes(scene, count, rng)
        different = [field for field in vars(scene) if getattr(scene, field) != getattr(changed, field)]
        assert len(different) == min(count, 9 if scene.letter else 8) and "kind" not in different
        assert (changed.letter is None) == (scene.letter is None)


def test_false_statements_are_false_of_one_picture_and_true_of_the_other() -> None:
    questions = misleading_questions(2, np.random.default_rng(0))
    assert len(questions) == 2 * 2 * len(PATTERNS) and len({one["pair"] for one in questions}) == 2 * len(PATTERNS)
    for first, second in zip(questions[::2], questions[1::2], strict=True):
        assert first["question"] == second["question"] and first["answer"] != second["answer"]
        for one, other in ((first, second), (second, first)):
            assert one["answer"] in one["options"] and other["answer"] in one["false_statement"]


def test_three_pictures_for_each_description(recipe: ModuleType) -> None:
    groups = recipe.draw_groups(3, np.random.default_rng(0))
    for i in range(3):
        told = [groups[name][i]["conversations"] for name in ("matching", "partly matching", "conflicting")]
        assert told[0] == told[1] == told[2]
        pictures = [np.asarray(groups[name][i]["image"], dtype=float) for name in groups]
        assert all(abs(pictures[0] - other).mean() > 1 for other in pictures[1:])


def test_the_recipe_runs(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    llm, tokenizer = load_language_model("mini-lm")
    mixer = InterleavedMoF({"clip": build_encoder("mini-clip")}, hidden_size=llm.config.hidden_size)
    model = MoFForConditionalGeneration.from_parts(mixer, llm, tokenizer)
    model.save_pretrained(tmp_path / "model")
    MoFProcessor.from_parts(model, tokenizer).save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--scenes", "3", "--pairs", "1", "--output", str(tmp_path / "x.json")]
    monkeypatch.setattr("sys.argv", [str(RECIPE), *arguments])
    monkeypatch.setattr(recipe, "console", Console(width=100))
    recipe.main()
    figures = json.loads((tmp_path / "x.json").read_text())
    assert figures["image match"]["model"]["conflicting"]["vig"][1] == 3
    assert figures["attention"]["model"]["records"] == 3 and len(figures["attention"]["model"]["layers"]) == 4
    assert figures["misleading text"]["model"]["misled"]["questions"] == 2 * len(PATTERNS)
    assert {"partly", "evenly", "misled"} <= set(capsys.readouterr().out.split())
