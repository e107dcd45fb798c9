"""The main job end to end, on a handful of scenes: as a user starts it, in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import vig.cli.app
from mof.cli.app import build_app

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/train_llava_mof_vig.py"
COLUMNS = {
    "name", "pair_accuracy", "question_accuracy", "by_pattern", "visual_tokens", "active_tokens", "seconds", "seed"
}  # fmt: skip


def command(*arguments):
    return [sys.executable, str(RECIPE), *map(str, arguments)]


def run(*arguments, check=True):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments), check=check, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The miniature's setting, cut down to seconds."""
    setting = yaml.safe_load((ROOT / "recipes/configs/miniature.yaml").read_text())
    setting["data"]["scenes"] = {"align": 16, "finetune": 40, "pairs": 1}
    setting["align"]["batch_size"] = setting["finetune"]["batch_size"] = 4
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(setting))
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run("--config", config, "--output_dir", folder)
    assert re.search(r"\d+/\d+ \[.*<.*(it/s|s/it)\]", done.stderr), "training shows no progress with rate and time left"
    return folder, done.stdout


def test_the_default_rows_are_measured_and_printed(finished):
    folder, printed = finished
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["clip", "interleaved", "interleaved+vig"]
    assert all(row.keys() >= COLUMNS for row in rows)
    assert [row["visual_tokens"] for row in rows] == [25, 50, 50]
    assert rows[2]["active_tokens"] < rows[1]["active_tokens"] == rows[0]["active_tokens"]
    assert all(set(row["by_pattern"]) == set(rows[0]["by_pattern"]) and len(row["by_pattern"]) == 9 for row in rows)
    assert all(name in printed for name in ("clip", "interleaved+vig", "held-out scenes"))
    page = (folder / "seed-0/vig-interleaved.html").read_text()
    assert "data:image/" in page and re.search(r"talk-\d+", page)


def test_the_page_of_a_run_can_be_made_again(finished, tmp_path):
    folder, _ = finished
    scores, records = folder / "seed-0/score-interleaved", folder / "finetune.json"
    arguments = ["vig", "report", *map(str, (scores, "--records", records, "--images", folder, "-o", tmp_path / "x.html"))]
    result = CliRunner().invoke(build_app({"vig": vig.cli.app.app}), arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "x.html").read_bytes() == (folder / "seed-0/vig-interleaved.html").read_bytes()


def test_only_adapters_move_while_aligning_and_encoders_are_never_saved(finished):
    folder, _ = finished
    aligned = load_file(folder / "seed-0/align-interleaved/model.safetensors")
    tuned = load_file(folder / "seed-0/finetune-interleaved/model.safetensors")
    shipped = load_file(ROOT / "mof/miniature/weights/mini-lm/model.safetensors")
    assert not any(key.startswith("mixer.encoders.") for key in aligned)
    for key, weight in shipped.items():
        assert aligned[f"language_model.{key}"].equal(weight.float()), key
    assert not tuned["language_model.model.layers.0.mlp.up_proj.weight"].equal(aligned["language_model.model.layers.0.mlp.up_proj.weight"])


def test_a_run_killed_in_the_middle_of_a_stage_resumes_to_the_same_result(config, finished, tmp_path):
    folder = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("--config", config, "--output_dir", folder), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    middle = folder / "seed-0/finetune-clip/checkpoints"
    deadline = time.monotonic() + 300
    while not (middle.is_dir() and list(middle.glob("checkpoint-*/trainer_state.json"))):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "seed-0/finetune-clip/stage.json").exists()
    (middle / "checkpoint-9999").mkdir()  # as a kill in the middle of writing leaves it
    (middle / "checkpoint-9999/model.safetensors").write_bytes(b"half")
    run("--config", config, "--output_dir", folder, "--resume")
    ours, theirs = (json.loads((one / "results.json").read_text())["rows"] for one in (folder, finished[0]))
    for row in (*ours, *theirs):
        del row["seconds"]
    assert ours == theirs
    for stage in ("finetune-clip", "finetune-interleaved+vig"):
        one, other = (load_file(where / f"seed-0/{stage}/model.safetensors") for where in (folder, finished[0]))
        assert all(one[key].equal(other[key]) for key in other), stage


def test_resuming_with_other_rows_keeps_those_that_are_there(config, finished):
    before = json.loads((finished[0] / "results.json").read_text())["rows"]
    run("--config", config, "--output_dir", finished[0], "--resume", "--rows", "clip")
    after = json.loads((finished[0] / "results.json").read_text())["rows"]
    assert sorted(after, key=lambda row: row["name"]) == sorted(before, key=lambda row: row["name"])


def test_a_wrong_path_is_one_line_and_leaves_no_folder(tmp_path):
    arguments = ("--config", ROOT / "recipes/configs/smollm2_photos.yaml", "--output_dir", tmp_path / "run")
    refused = run(*arguments, "--data_dir", tmp_path / "nowhere", check=False)
    assert refused.returncode and "nowhere" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"null": "blurr"}, "blurr"),
        ({"encoders": {"clip": {"name": "mini-clip"}}}, "two encoders"),
    ],
)
def test_what_would_fail_hours_later_is_refused_at_once(config, tmp_path, change, message):
    setting = yaml.safe_load(config.read_text()) | change
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(setting))
    refused = run("--config", path, "--compare", "fusion", "--output_dir", tmp_path / "run", check=False)
    assert refused.returncode and message in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_refused_in_one_line(config, finished):
    other = run("--config", config, "--output_dir", finished[0], "--data_dir", "elsewhere", "--resume", check=False)
    assert other.returncode and "another run" in other.stderr and "Traceback" not in other.stderr


def test_the_study_of_selections_measures_misled_accuracy_and_is_drawn(config, tmp_path):
    rows = ("interleaved", "vig-tokens 0.5", "random-samples 0.5")
    printed = run("--config", config, "--compare", "selection", "--rows", *rows, "--output_dir", tmp_path / "run").stdout
    results = {row["name"]: row for row in json.loads((tmp_path / "run/results.json").read_text())["rows"]}
    assert list(results) == list(rows) and "misled" in printed
    everything, *selected = (results[name]["active_tokens"] for name in rows)
    assert all(0 < one < everything for one in selected)
    assert all(0 <= row["misled_accuracy"] <= 1 for row in results.values())
    assert (tmp_path / "run/plots/selection.png").stat().st_size > 10_000


def test_unknown_rows_are_refused(config, tmp_path):
    refused = run("--config", config, "--output_dir", tmp_path / "run", "--rows", "clop", check=False)
    assert refused.returncode and "clop" in refused.stderr and "interleaved+vig" in refused.stderr


def test_a_dry_run_of_llava_prints_1152_visual_tokens_and_needs_no_network(tmp_path):
    printed = run("--config", ROOT / "recipes/configs/llava15_7b.yaml", "--dry_run").stdout
    assert "1,152" in printed or "1152" in printed
