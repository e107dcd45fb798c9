"""The main job end to end, on a handful of scenes."""

import contextlib
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import launch
from support.commands import mof

import train_llava_mof_vig
from encoders import FeatureStore
from study.command import current_spelling

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/train_llava_mof_vig.py"
PHOTOS = ROOT / "recipes/configs/smollm2_photos.yaml"
COLUMNS = {
    "name", "pair_accuracy", "question_accuracy", "by_pattern", "visual_tokens", "active_tokens", "seconds", "seed"
}  # fmt: skip


def run(*arguments):
    """The standard output and error of the recipe in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", [str(RECIPE), *map(str, arguments)])
        train_llava_mof_vig.main()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The miniature's setting, cut down to seconds."""
    setting = yaml.safe_load((ROOT / "recipes/configs/miniature.yaml").read_text())
    setting["data"]["scenes"] = {"align": 16, "finetune": 40, "pairs": 1, "noise": {"ungrounded": 0.4}}
    setting["align"]["batch_size"] = setting["finetune"]["batch_size"] = 4
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(setting))
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    out, err = run("--config", config, "--output", folder)
    assert re.search(r"\d+/\d+ \[.*<.*(it/s|s/it)\]", err), "training shows no progress with rate and time left"
    return folder, out


@pytest.mark.slow
def test_the_default_rows_are_measured_and_printed(finished):
    folder, printed = finished
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["clip", "interleaved", "interleaved+random", "interleaved+vig"]
    assert all(row.keys() >= COLUMNS for row in rows)
    assert [row["visual_tokens"] for row in rows] == [25, 50, 50, 50]
    assert rows[3]["active_tokens"] == rows[2]["active_tokens"] < rows[1]["active_tokens"] == rows[0]["active_tokens"]
    assert all(set(row["by_pattern"]) == set(rows[0]["by_pattern"]) and len(row["by_pattern"]) == 9 for row in rows)
    assert all(name in printed for name in ("clip", "interleaved+vig", "held-out scenes", "ungrounded"))
    assert (folder / "plots/accuracy.png").stat().st_size > 10_000
    shown = (folder / "run.html").read_text()
    assert str(folder / "run.html") in printed and 'href="seed-0/vig-interleaved.html"' in shown
    assert shown.count("data:image/") == 18 and shown.count("interleaved+random:") == 18
    page = (folder / "seed-0/vig-interleaved.html").read_text()
    assert "data:image/" in page and re.search(r"talk-\d+", page)


@pytest.mark.slow
def test_the_page_of_a_run_can_be_made_again(finished, tmp_path):
    folder, _ = finished
    scores, records = folder / "seed-0/score-interleaved", folder / "finetune.json"
    result = mof("vig", "report", scores, "--records", records, "--images", folder, "-o", tmp_path / "x.html")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "x.html").read_bytes() == (folder / "seed-0/vig-interleaved.html").read_bytes()


@pytest.mark.slow
def test_only_adapters_move_while_aligning_and_encoders_are_never_saved(finished):
    folder, _ = finished
    aligned = load_file(folder / "seed-0/align-interleaved/model.safetensors")
    tuned = load_file(folder / "seed-0/finetune-interleaved/model.safetensors")
    shipped = load_file(ROOT / "mof/miniature/weights/mini-lm/model.safetensors")
    assert not any(key.startswith("mixer.encoders.") for key in aligned)
    for key, weight in shipped.items():
        assert aligned[f"language_model.{key}"].equal(weight.float()), key
    assert not tuned["language_model.model.layers.0.mlp.up_proj.weight"].equal(aligned["language_model.model.layers.0.mlp.up_proj.weight"])


@pytest.mark.slow
def test_stage_2_with_a_language_model_in_4_bits(config, tmp_path):
    pytest.importorskip("bitsandbytes")
    setting = yaml.safe_load(config.read_text())
    setting["finetune"] |= {"lora": 4, "load_in_4bit": True}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(setting))
    run("--config", tmp_path / "small.yaml", "--output", tmp_path / "run", "--rows", "interleaved")
    (row,) = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    assert row["pair_accuracy"] is not None and row["misled_accuracy"] is not None
    aligned, tuned = (load_file(tmp_path / f"run/seed-0/{stage}-interleaved/model.safetensors") for stage in ("align", "finetune"))
    for name, weight in tuned.items():
        change = weight - aligned[name]
        assert bool(change.any()) == ("_proj" in name), name
        assert not change.any() or torch.linalg.matrix_rank(change, rtol=1e-4) == 4


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_killed_in_the_middle_of_a_stage_resumes_to_the_same_result(config, finished, tmp_path):
    folder, row = tmp_path / "killed", "interleaved+vig"
    code = "import train_llava_mof_vig; train_llava_mof_vig.main()"
    (process,) = processes = launch.start(code, "--config", config, "--output", folder, "--rows", row)
    middle = folder / f"seed-0/finetune-{row}/checkpoints"
    while not (middle.is_dir() and list(middle.glob("checkpoint-*/trainer_state.json"))):
        assert process.exitcode is None, launch.kill(processes)
        time.sleep(0.05)
    launch.kill(processes)
    assert not (folder / f"seed-0/finetune-{row}/stage.json").exists()
    (middle / "checkpoint-9999").mkdir()  # as a kill in the middle of writing leaves it
    (middle / "checkpoint-9999/model.safetensors").write_bytes(b"half")
    run("--config", config, "--output", folder, "--resume", "--rows", row)
    resumed, whole = (json.loads((path / "results.json").read_text())["rows"] for path in (folder, finished[0]))
    (whole,) = (result for result in whole if result["name"] == row)
    assert [result | {"seconds": 0} for result in resumed] == [whole | {"seconds": 0}]
    ours, theirs = (load_file(path / f"seed-0/finetune-{row}/model.safetensors") for path in (folder, finished[0]))
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.slow
def test_resuming_with_other_rows_keeps_those_that_are_there(config, finished):
    before = json.loads((finished[0] / "results.json").read_text())["rows"]
    run("--config", config, "--output", finished[0], "--resume", "--rows", "clip")
    after = json.loads((finished[0] / "results.json").read_text())["rows"]
    assert sorted(after, key=lambda row: row["name"]) == sorted(before, key=lambda row: row["name"])


@pytest.mark.slow
def test_fusions_share_features_and_say_what_each_encoder_is_worth(config, tmp_path):
    folder = tmp_path / "fusion"
    run("--compare", "fusion", "--config", config, "--output", folder, "--rows", "concat", "concat-equal", "clip")
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    assert {name: row["visual_tokens"] for name, row in rows.items()} == {"concat": 25, "concat-equal": 50, "clip": 25}
    assert rows["concat"]["adapter_parameters"] == rows["concat-equal"]["adapter_parameters"] == 2 * 192 * 192 + 192 + 192 * 192 + 192
    assert set(rows["concat"]["worth"]) == {"clip", "dinov2", "blurred", "swapped"} and "worth" not in rows["concat-equal"]
    assert all(0 <= row["option_named"] <= 1 for row in rows.values())
    store = FeatureStore(folder / "features/store")
    assert set(store.manifest) == {"clip", "dinov2"} and len(store.keys) == 16 + 36  # a tenth of the 40 records has no image
    assert not json.loads((folder / "data-noise/finetune-0-truth.json").read_text())["talk-0"]["noise"]


@pytest.mark.slow
def test_a_wrong_path_is_one_line_and_leaves_no_folder(tmp_path):
    """As a user starts it, under an option's former spelling."""
    arguments = [sys.executable, RECIPE, "--config", PHOTOS, "--output_dir", tmp_path / "run", "--data_dir", tmp_path / "nowhere"]
    refused = subprocess.run(arguments, capture_output=True, text=True, env=launch.environment())
    assert refused.returncode and "nowhere" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "named"),
    [
        ({"null": "blurr"}, [], "blurr"),
        ({"encoders": {"clip": {"name": "mini-clip"}}}, ["--compare", "fusion"], "two encoders"),
        ({}, ["--rows", "clop"], r"clop.*interleaved\+vig"),
    ],
)
def test_what_would_fail_hours_later_is_refused_at_once(config, tmp_path, change, arguments, named):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | change))
    with pytest.raises(ValueError, match=named):
        run("--config", path, *arguments, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_with_another_run_is_refused(config, finished):
    with pytest.raises(ValueError, match="data_dir: .*elsewhere"):
        run("--config", config, "--output", finished[0], "--data-dir", "elsewhere", "--resume")


@pytest.mark.slow
def test_the_study_of_selections_measures_misled_accuracy_and_is_drawn(config, tmp_path):
    rows = ("interleaved", "vig-tokens 0.5", "random-samples 0.5")
    printed, _ = run("--config", config, "--compare", "selection", "--rows", *rows, "--output", tmp_path / "run")
    results = {row["name"]: row for row in json.loads((tmp_path / "run/results.json").read_text())["rows"]}
    assert list(results) == list(rows) and "misled" in printed
    everything, *selected = (results[name]["active_tokens"] for name in rows)
    assert all(0 < tokens < everything for tokens in selected)
    assert all(0 <= row["misled_accuracy"] <= 1 for row in results.values())
    assert (tmp_path / "run/plots/selection.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_study_of_noise_compares_ways_on_the_same_records(config, tmp_path):
    rows = ("everything 0.4", "lowest-loss 0.4", "grounded 0.4", "vig-shuffled mixed", "vig-steps mixed", "vig-floor 0")
    printed, _ = run("--config", config, "--compare", "noise", "--rows", *rows, "--output", tmp_path / "run")
    results = {row["name"]: row for row in json.loads((tmp_path / "run/results.json").read_text())["rows"]}
    assert list(results) == list(rows) and "minus everything" in printed
    everything, lowest, grounded, shuffled, steps, floor = (results[name]["active_tokens"] for name in rows)
    truth = json.loads((tmp_path / "run/data-noise/finetune-0.4-truth.json").read_text())
    noisy = sum(entry["noise"] == "ungrounded" for entry in truth.values())
    assert noisy and grounded == pytest.approx(everything * (1 - noisy / len(truth)), rel=0.1)
    assert lowest < everything and shuffled < everything and floor < everything
    assert steps > shuffled  # it goes through its records more than once
    assert (
        results["vig-floor 0"]["threshold"] == 0 <= results["vig-floor 0"]["negative"] <= 1 and "threshold" not in results["grounded 0.4"]
    )
    assert set(results["vig-steps mixed"]["auroc"]) == {"guessable", "boilerplate", "plausible"}


@pytest.mark.slow
def test_a_dry_run_of_llava_prints_1152_visual_tokens_and_needs_no_network():
    printed, _ = run("--config", ROOT / "recipes/configs/llava15_7b.yaml", "--dry-run")
    assert "1,152" in printed


def test_former_spellings_of_options():
    words = "--output_dir a --output_dir=b_c --dry_run --rows vig_x interleaved+vig -o d --output e"
    current = "--output a --output=b_c --dry-run --rows vig_x interleaved+vig -o d --output e"
    assert [current_spelling(word) for word in words.split()] == current.split()
