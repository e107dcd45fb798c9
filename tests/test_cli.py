"""The command line, called as a user would, on tiny models saved in a temporary folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from support.commands import APP, mof, refused
from typer.testing import Result

from encoders import build_encoder
from encoders.command_groups import command_group, resumes
from mof.cli.app import build_app
from mof.data.digests import digest
from mof.data.records import RecordError
from vig import load_scores

ROOT = Path(__file__).parent.parent
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def commands(group: Any) -> list[list[str]]:
    """Return every command as the words that call it."""
    words = []
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        inner = commands(command) if hasattr(command, "list_commands") else []
        words += [[name, *more] for more in inner] or [[name]]
    return words


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """model/, records.json and the records' images."""
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
    inputs = ("--model", folder / "model", "--records", folder / "records.json", "--images", folder)
    return mof("vig", "score", *inputs, "--output", folder / "scores", *more)


@pytest.mark.parametrize("words", commands(typer.main.get_command(APP)), ids=" ".join)
def test_help_shows_an_example_that_parses(words: list[str]) -> None:
    result = mof(*words, "--help")
    assert result.exit_code == 0
    example = re.search(r"Example:\n\s+(mof .*)", result.output)
    assert example is not None and example[1].split()[1:][: len(words)] == words
    for option in re.findall(r"--[a-z-]+", example[1]):
        assert option in result.output.split("Options:")[1]


def test_group_shows_the_first_line_of_each_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line comes from the source, also for a module that cannot be imported; a missing module has an empty line."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "unusable.py").write_text(
        "import nothing_of_that_name\n\ndef fly():\n    '''Fly away.\n\n    Far.'''\n\nbirds = group({}, callback=fly)\nfish = group({}, help='Swim.')"
    )
    app = command_group({name: f"unusable:{name}" for name in ("fly", "birds", "fish")} | {"gone": "no_such_module:gone"}, help="All.")
    lines = [line.split() for line in mof("--help", app=app).stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert lines == [["fly", "Fly", "away."], ["birds", "Fly", "away."], ["fish", "Swim."], ["gone"]]
    assert mof("vig", "--help").stdout.count("Measure how much the image helped") == 1


def test_declared_sub_commands_exist() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mof.commands"]
    for name, value in declared.items():
        command = EntryPoint(name, value, "mof.commands").load()
        assert isinstance(command, typer.Typer) or callable(command)


@pytest.mark.parametrize("arguments", [["--help"], ["encode", "--list"], ["vig", "--help"], ["--version"]], ids=" ".join)
def test_help_and_list_load_no_slow_library(arguments: list[str]) -> None:
    program = (
        "import sys; from mof.cli.app import build_app; app = build_app({'vig': 'vig.cli.app:app'})\n"
        "try: app(sys.argv[1:])\n"
        "finally: print({'torch', 'numpy', 'transformers', 'pyarrow'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout
    assert done.stderr.splitlines()[-1] == "set()"


def test_version() -> None:
    assert version("mof-vig") in mof("--version").stdout


def test_chat_answers_greedily(folder: Path) -> None:
    arguments = ("chat", "--model", folder / "model", "--image", folder / "red.png", "--max-new-tokens", "5", "Colour?")
    first, second = mof(*arguments), mof(*arguments)
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout  # and not the progress bars


def test_score_then_select(folder: Path) -> None:
    result = score(folder, "--null", "zero", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    assert "3 of 3 records scored" in result.output
    output = folder / "selected.json"
    inputs = ("--scores", folder / "scores", "--records", folder / "records.json")
    result = mof("vig", "select", *inputs, "--keep", "0.3", "--output", output)
    assert result.exit_code == 0, result.output
    assert "1 of 3 samples" in result.output and f"1 of 3 records written to {output}" in result.output
    assert "Selection is of uncertain use: 3 records are too few" in result.output
    result = mof("vig", "select", *inputs, "--output", folder / "records.json")
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
    result = mof(
        "vig", "select", *inputs, "--keep", "0", "--source-key", "source", "--quota", "a=1", "--quota", "b=0.5", "--output", output
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"a +2 of +2 samples .*\n +b +1 of +1 samples", result.output)
    assert json.loads(output.read_text())[2]["token_mask"][-1]
    more = ("--threshold", "-100", "--token-threshold", "none", "--weights", "0.5", "2", "--output", output)
    result = mof("vig", "select", *inputs, *more)
    assert "3 of 3 samples" in result.output and "sparsity 0.0%" in result.output, result.output
    assert all(min(record["token_weights"]) > 0 for record in json.loads(output.read_text()))
    sparse = ("--keep", "1", "--token-keep", "0", "--no-end-of-turn", "--source-key", "image", "--quota", "0.1", "--output", output)
    result = mof("vig", "select", *inputs, *sparse)
    assert "sparsity 100.0%" in result.output, result.output
    refused(mof("vig", "select", *inputs, "--source-key", "sorce", "--output", output), "--source-key='sorce'", "no record")
    refused(mof("vig", "select", *inputs, "--token-threshold", "sharde", "--output", output), "a number, 'shared' or 'none', got 'sharde'")
    drawn = [mof("vig", "select", *inputs, "--random", "tokens", "--seed", seed, "--output", output) for seed in "01"]
    assert all("at random" in result.output for result in drawn) and len(json.loads(output.read_text())) == 3


@pytest.mark.slow
def test_training_without_padding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--batch-size", "3", "--accumulate", "1", "--learning-rate", "0.1", "--set", "optim=sgd")
    settings = (*settings, "--set", "lr_scheduler_type=constant")
    inputs = ("train", "--model", folder / "model", "--records", folder / "records.json", "--images", folder, *settings)
    for output, more in (("padded", ()), ("flat", ("--padding-free",))):
        result = mof(*inputs, "--output", folder / output, *more)
        assert result.exit_code == 0, result.output
    padded, flat, start = (load_file(folder / name / "model.safetensors") for name in ("padded", "flat", "model"))
    assert any(not torch.equal(padded[name], start[name]) for name in start)
    for name, weights in padded.items():
        torch.testing.assert_close(flat[name], weights, atol=1e-5, rtol=1e-4)
    refused(mof(*inputs, "--output", folder / "flat"), "padding_free")
    monkeypatch.setattr("vig.training.trainer.keeps_records_apart", lambda *_: False)
    result = mof(*inputs, "--output", folder / "other", "--padding-free")
    assert result.exit_code == 2 and "mof: MoFForConditionalGeneration" in result.stderr


def test_a_bad_line_is_listed_and_the_rest_goes_on(folder: Path) -> None:
    lines = [json.dumps(record) for record in json.loads((folder / "records.json").read_text())]
    (folder / "records.jsonl").write_text("\n".join([lines[0], lines[1], lines[1][:-20], lines[2]]))
    inputs = ("--records", folder / "records.jsonl")
    result = score(folder, *map(str, inputs))
    assert result.exit_code == 0 and "3 of 4 records scored" in result.output, result.output
    [rejected] = (folder / "scores/_rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["id"] == "records.jsonl, line 3" and "not JSON" in json.loads(rejected)["reason"]
    result = mof("vig", "select", *inputs, "--scores", folder / "scores", "--keep", "1", "--output", folder / "out.json")
    assert result.exit_code == 0 and [record["id"] for record in json.loads((folder / "out.json").read_text())] == list(COLOURS)
    report = ("vig", "report", folder / "scores", *inputs, "--images", folder, "-o", folder / "report.html")
    assert mof(*report).exit_code == 0


def test_scoring_without_any_image_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    inputs = ("vig", "score", "--model", folder / "model", "--images", folder / "empty", "--output", folder / "scores")
    refused(mof(*inputs, "--records", folder / "records.json"), f"none of the {len(COLOURS)} records could be scored")
    records = [{**record, "id": str(i)} for i, record in enumerate(10 * json.loads((folder / "records.json").read_text()))]
    (folder / "many.json").write_text(json.dumps(records))
    result = mof(*inputs, "--records", folder / "many.json")
    refused(result, "first 20 images of the records are missing", str(folder / "empty"))
    assert "not scored" not in result.output, "it stops before the first record"


def test_refused_input_is_one_line(folder: Path) -> None:
    refused(score(folder, "--null", "blurr"), "blurr")
    chat = ("chat", "--model", folder / "model", "What?", "--image")
    refused(mof("chat", "--model", folder / "nothing", "--image", folder / "red.png", "What?"), "nothing", "config.json")
    refused(mof(*chat, folder / "no.png"), "no.png")
    (folder / "text").mkdir()
    (folder / "text/config.json").write_text('{"model_type": "gpt2"}')
    refused(mof("chat", "--model", folder / "text", "--image", folder / "red.png", "What?"), str(folder / "text"), "gpt2")
    refused(mof(*chat, folder / "red.png", "--device", "cuda:99"), "cuda:99")
    select = ("vig", "select", "--scores", folder, "--records", folder / "records.json", "--output", folder / "out.json")
    refused(mof(*select), "_manifest.json")
    score(folder)
    select = ("vig", "select", "--scores", folder / "scores", "--output", folder / "out.json")
    refused(mof(*select, "--records", folder / "records.json", "--keep", "7"), "7")
    refused(mof(*select, "--records", folder / "no.json"), "no.json")
    select = (*select, "--records", folder / "records.json")
    refused(mof(*select, "--quota", "0.5"), "--source-key")
    refused(mof(*select, "--source-key", "source", "--quota", "0.5", "--quota", "a=1"), "0.5 a=1")
    refused(mof(*select, "--source-key", "image", "--quota", "a=1"), "'a'", "(none)")
    refused(mof(*select, "--token-threshold", "all"), "'all'")
    refused(mof("encode"), "--list")


def test_typer_refuses_unknown_names(folder: Path) -> None:
    assert mof("encoder").exit_code == 2
    result = mof("vig", "select", "--scores", folder, "--records", folder, "--output", folder / "out.json", "--random", "half")
    assert result.exit_code == 2 and "half" in result.stderr


def failing(error: BaseException | None) -> typer.Typer:
    def fail() -> None:
        if error is None:
            json.loads("{")  # a library's ValueError
        else:
            raise error

    return build_app({"fail": fail, "fail-and-resume": resumes(fail), "unknown-encoder": lambda: build_encoder("eagle-eye")})


def test_only_our_errors_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    refused(mof("unknown-encoder", app=failing(None)), "eagle-eye")
    refused(mof("fail", app=failing(RecordError("record 'a 7'"))), "record 'a 7'")
    refused(mof("fail", app=failing(FileNotFoundError(2, "No such file", "x.json"))), "mof: x.json: No such file; give a path that exists")
    refused(mof("fail", app=failing(IsADirectoryError(21, "Is a directory", "x"))), "x: Is a directory; it is a folder, give a file")
    assert not list(tmp_path.iterdir())
    for error, kind in ((KeyError("colour"), "KeyError"), (None, "JSONDecodeError"), (RuntimeError("shapes\ndiffer"), "RuntimeError")):
        result = mof("fail", app=failing(error))
        [line], [log] = result.stderr.splitlines(), tmp_path.iterdir()
        assert result.exit_code == 1 and kind in line and str(log) in line
        assert "Traceback" in log.read_text() and "in fail" in log.read_text()
        log.unlink()


def test_debug_shows_the_traceback() -> None:
    app = failing(RecordError("record 'a 7'"))
    for result in (mof("--debug", "fail", app=app), mof("fail", "--debug", app=app), mof("fail", app=app, MOF_DEBUG="1")):
        assert result.exit_code == 2
        assert "Traceback" in result.stderr and "in fail" in result.stderr
        assert result.stderr.splitlines()[-1] == "mof: record 'a 7'"


def test_interrupted() -> None:
    app = failing(KeyboardInterrupt())
    first, second = mof("fail", app=app), mof("fail-and-resume", app=app)
    assert first.exit_code == second.exit_code == 130
    assert first.stderr != second.stderr and "same command" in second.stderr
    assert len(first.stderr.splitlines()) == len(second.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["select", "report"])
def test_interrupted_before_the_file_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"vig.cli.{command}.load_scores", interrupted)
    scores = ("--scores", folder) if command == "select" else (folder,)
    result = mof("vig", command, *scores, "--records", folder / "records.json", "--output", folder / "x")
    assert result.exit_code == 130 and "nothing was written; the same command" in result.stderr
    assert not (folder / "x").exists()


def test_an_interrupted_probe_says_what_to_do(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mof.evals.mmvp_vlm.probe_mmvp_vlm", interrupted)
    result = mof("probe", "mmvp-vlm", "--data", folder, "--encoder", "mini-clip", "--output", tmp_path / "probes")
    assert result.exit_code == 130 and "nothing was written; the same command" in result.stderr
    assert not (tmp_path / "probes").exists()


def test_records_of_the_very_file_that_was_scored_are_not_digested(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the file is known by its content; in an edited file, each record is compared."""
    assert score(folder).exit_code == 0
    given, output = folder / "copy.json", folder / "out.json"
    given.write_text((folder / "records.json").read_text())
    inputs = ("--scores", folder / "scores", "--records", given, "--keep", "1", "--output", output)
    assert mof("vig", "select", *inputs).exit_code == 0
    plain, digested = json.loads(output.read_text()), []
    monkeypatch.setattr("vig.selection.selected.digest", lambda record: digested.append(record) or digest(record))
    assert mof("vig", "select", *inputs).exit_code == 0 and not digested
    given.write_text(json.dumps(json.loads(given.read_text()), indent=1))  # the same records in another file
    assert mof("vig", "select", *inputs).exit_code == 0
    assert len(digested) == len(COLOURS) and json.loads(output.read_text()) == plain
    given.write_text(given.read_text().replace("It is", "Is it"))
    refused(mof("vig", "select", *inputs), "is not what was scored")


def test_errors_name_options_and_leave_paths_alone() -> None:
    def fail(images: Annotated[Path | None, typer.Option()] = None, max_length: Annotated[int, typer.Option()] = 1) -> None:
        raise RecordError("/data/max_length/image_folder.png: not in image_folder=/data, max_length: 3; give a larger max_length.")

    result = mof("fail", app=build_app({"fail": fail}))
    assert result.stderr == "mof: /data/max_length/image_folder.png: not in --images=/data, max_length: 3; give a larger --max-length.\n"


def test_old_spellings_still_work(folder: Path) -> None:
    inputs = ("--model", folder / "model", "--records", folder / "records.json")
    result = mof("vig", "score", *inputs, f"--image-folder={folder}", "--output-dir", folder / "scores")
    assert result.exit_code == 0 and (folder / "scores/_manifest.json").is_file()
    notes = [re.findall(r"--[a-z-]+", line) for line in result.stderr.splitlines() if line.startswith("mof: ")]
    assert notes == [["--image-folder", "--images"], ["--output-dir", "--output"]]
    assert not re.search("--image-folder|--output-dir|--out\\b", mof("vig", "score", "--help").stdout)
    result = mof("encode", "--out", folder / "store", "--images", folder, "--encoder", "eagle-eye")
    assert result.exit_code == 2 and "--output" in result.stderr.splitlines()[0]


HELP = {" ".join(words): mof(*words, "--help").output for words in commands(typer.main.get_group(APP))}
OUTPUTS = [name.split() for name, text in HELP.items() if "--output" in text and "PATH|URL" not in text]


def test_the_jobs_of_a_cluster_write_to_object_storage() -> None:
    jobs = {name for name, text in HELP.items() if "--ray" in text}
    assert {name for name, text in HELP.items() if "PATH|URL" in text} == jobs
    assert {"encode", "vig score", "eval mmvp"} < jobs


@pytest.mark.parametrize("words", OUTPUTS, ids=" ".join)
def test_an_output_on_object_storage_is_refused_by_name(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of this name would be a folder "s3:" here."""
    monkeypatch.chdir(tmp_path)
    result = mof(*words, "x", "--output", "s3://bucket/out")  # some take a positional argument
    assert result.exit_code == 2
    said = " ".join(re.sub(r"[^\w:/ -]", " ", result.output).split())
    assert "s3://bucket/out is a URL" in said and "sync" in said
    assert not list(tmp_path.iterdir())
