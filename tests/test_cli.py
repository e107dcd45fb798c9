"""The command line, called as a user would, on tiny models saved in a temporary folder."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import vig.cli.app
from mof import MoFForConditionalGeneration, MoFProcessor
from mof.cli.app import build_app
from vig import load_scores
from vig.cli.train import train

ROOT = Path(__file__).parent.parent
APP = build_app({"train": train, "vig": vig.cli.app.app})
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def commands(app: typer.Typer) -> list[list[str]]:
    """Every command as the words that call it."""
    found = [[command.name or command.callback.__name__] for command in app.registered_commands]
    for group in app.registered_groups:
        found += [[group.name, *words] for words in commands(group.typer_instance)]
    return found


@pytest.fixture
def folder(tmp_path: Path, tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> Path:
    """model/, records.json and the records' images."""
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    records = []
    for name, colour in COLOURS.items():
        image = Image.new("RGB", (32, 32), colour)
        image.paste((255, 255, 255), (0, 0, 16, 16))
        image.save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": f"It is {name}."}]
        records.append({"id": name, "image": f"{name}.png", "conversations": turns})
    (tmp_path / "records.json").write_text(json.dumps(records))
    return tmp_path


def score(folder: Path, *more: str) -> Result:
    inputs = ("--model", folder / "model", "--records", folder / "records.json", "--image-folder", folder)
    return run("vig", "score", *inputs, "--output-dir", folder / "scores", *more)


@pytest.mark.parametrize("words", commands(APP), ids=" ".join)
def test_help_shows_an_example_that_parses(words: list[str]) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0
    example = re.search(r"Example:\n\s+(mof .*)", result.output)
    assert example is not None and example[1].split()[1:][: len(words)] == words
    for option in re.findall(r"--[a-z-]+", example[1]):
        assert option in result.output.split("Options:")[1]


def test_declared_sub_commands_exist() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mof.cli"]
    for name, value in declared.items():
        command = EntryPoint(name, value, "mof.cli").load()
        assert isinstance(command, typer.Typer) or callable(command)


def test_encoders_are_listed_without_weights() -> None:
    result = run("encode", "--list")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.output.splitlines() if line.split()[:1] == ["clip-vit-l14-336"])
    assert row.split() == ["clip-vit-l14-336", "1024", "14", "336", "576", "427.9", "yes", "mit"]


def test_chat_answers_greedily(folder: Path) -> None:
    arguments = ("chat", "--model", folder / "model", "--image", folder / "red.png", "--max-new-tokens", "5", "Colour?")
    first, second = run(*arguments), run(*arguments)
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout  # and not the progress bars


def test_score_then_select(folder: Path) -> None:
    result = score(folder, "--null", "zero", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    assert "3 of 3 records scored" in result.output
    output = folder / "selected.json"
    inputs = ("--scores", folder / "scores", "--records", folder / "records.json")
    result = run("vig", "select", *inputs, "--keep", "0.3", "--output", output)
    assert result.exit_code == 0, result.output
    assert "1 of 3 samples" in result.output and f"1 of 3 records written to {output}" in result.output
    result = run("vig", "select", *inputs, "--output", folder / "records.json")
    assert result.exit_code == 2 and "would overwrite the --records" in result.output
    assert len(json.loads((folder / "records.json").read_text())) == 3
    best = max(load_scores(folder / "scores"), key=lambda one: one.vig)
    [selected] = json.loads(output.read_text())
    assert selected["id"] == best.id
    assert len(selected["token_mask"]) == len(best.token_ids)
    # every other option
    records = json.loads((folder / "records.json").read_text())
    for record, source in zip(records, ("a", "a", "b"), strict=True):
        record["source"] = source
    (folder / "records.json").write_text(json.dumps(records))
    result = run(
        "vig", "select", *inputs, "--keep", "0", "--source-key", "source", "--quota", "a=1", "--quota", "b=0.5", "--output", output
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"a +2 of +2 samples .*\n +b +1 of +1 samples", result.output)
    assert json.loads(output.read_text())[2]["token_mask"][-1]
    more = ("--threshold", "-100", "--token-threshold", "none", "--weights", "0.5", "2", "--output", output)
    result = run("vig", "select", *inputs, *more)
    assert "3 of 3 samples" in result.output and "sparsity 0.0%" in result.output, result.output
    assert all(min(record["token_weights"]) > 0 for record in json.loads(output.read_text()))
    sparse = ("--keep", "1", "--token-keep", "0", "--no-end-of-turn", "--source-key", "image", "--quota", "0.1", "--output", output)
    result = run("vig", "select", *inputs, *sparse)
    assert "sparsity 100.0%" in result.output, result.output
    drawn = [run("vig", "select", *inputs, "--random", "tokens", "--seed", seed, "--output", output) for seed in "01"]
    assert all("at random" in result.output for result in drawn) and len(json.loads(output.read_text())) == 3


def test_a_bad_line_is_listed_and_the_rest_goes_on(folder: Path) -> None:
    lines = [json.dumps(record) for record in json.loads((folder / "records.json").read_text())]
    (folder / "records.jsonl").write_text("\n".join([lines[0], lines[1], lines[1][:-20], lines[2]]))
    inputs = ("--records", folder / "records.jsonl")
    result = score(folder, *map(str, inputs))
    assert result.exit_code == 0 and "3 of 4 records scored" in result.output, result.output
    [rejected] = (folder / "scores/rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["id"] == "records.jsonl, line 3" and "not JSON" in json.loads(rejected)["reason"]
    result = run("vig", "select", *inputs, "--scores", folder / "scores", "--keep", "1", "--output", folder / "out.json")
    assert result.exit_code == 0 and [record["id"] for record in json.loads((folder / "out.json").read_text())] == list(COLOURS)
    report = ("vig", "report", folder / "scores", *inputs, "--images", folder, "-o", folder / "report.html")
    assert run(*report).exit_code == 0


def refused(result: Result, *words: str) -> None:
    """One line on stderr (after progress bars, if any), exit code 2, no traceback."""
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mof: ")
    assert all(word in last for word in words), last


def test_errors_are_one_line(folder: Path) -> None:
    refused(score(folder, "--null", "blurr"), "blurr", "blur")
    refused(run("chat", "--model", folder / "nothing", "--image", folder / "red.png", "What?"), "nothing", "config.json")
    refused(run("chat", "--model", folder / "model", "--image", folder / "no.png", "What?"), "no.png")
    select = ("vig", "select", "--scores", folder, "--records", folder / "records.json", "--output", folder / "out.json")
    refused(run(*select), "manifest.json")
    score(folder)
    select = ("vig", "select", "--scores", folder / "scores", "--output", folder / "out.json")
    refused(run(*select, "--records", folder / "records.json", "--keep", "7"), "[0, 1]")
    refused(run(*select, "--records", folder / "no.json"), "no.json")
    select = (*select, "--records", folder / "records.json")
    refused(run(*select, "--quota", "0.5"), "--source-key")
    refused(run(*select, "--source-key", "source", "--quota", "0.5", "--quota", "a=1"), "NAME=SHARE")
    refused(run(*select, "--source-key", "source", "--quota", "a=1"), "'a'", "(none)")
    refused(run(*select, "--token-threshold", "all"), "--token-threshold", "'all'")
    refused(run(*select, "--random", "half"), "'half'", "samples")
    refused(run("encode"), "--list")


def test_unknown_command_exits_2() -> None:
    assert run("encoder").exit_code == 2
