"""`mof eval` from end to end: models, endpoints, finished answers, judges; killed and resumed."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.commands import mof
from support.stand_in import Body, question_of, serve
from typer.testing import Result

from encoders import ImageError
from encoders.whole_files import read_sealed, read_sealed_lines
from mof.evals.chair import photos
from mof.evals.pope import PopeQuestion, eval_pope

PAIRS = 12


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """MMVP's form: question 2k-1 is answered (a), 2k is answered (b)."""
    folder = tmp_path / "MMVP"
    (folder / "MMVP Images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lndex", "Question", "Options", "Correct Answer", "Category"])
        for i in range(1, 2 * PAIRS + 1):
            writer.writerow([i, f"Number {i}: open or closed?", "(a) Open (b) Closed", "(a)" if i % 2 else "(b)", f"p{(i - 1) // 2 % 3}"])
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / "MMVP Images" / f"{i}.jpg")
    return folder


run = partial(mof, "eval")


def done(result: Result, out: Path) -> Any:
    assert result.exit_code == 0, result.output
    return read_sealed(out / "result.json")


def answer_right(body: Body) -> str:
    number = int(re.search(r"Number (\d+)", question_of(body))[1])
    return "(a)" if number % 2 else "The wings are closed."


def test_a_model(tiny_folder: Path, tmp_path: Path, data: Path) -> None:
    out, arguments = tmp_path / "run", ("mmvp", "--data", data, "--model", tmp_path / "model", "--max-new-tokens", "6")
    first = done(run(*arguments, "--output", out), out)
    assert first["usage"]["asked"] == first["questions"] == 2 * PAIRS and first["pairs"] == PAIRS
    assert first["prompt"] == "official" and list(first["scores"]) == ["letter or text", "letter", "text", "likelihood"]
    assert len(first["unmatched"]) > 0  # a random model talks nonsense
    rows = read_sealed_lines(out / "answers.jsonl")
    for row in rows:
        a, b = row["log_likelihoods"]
        assert row["chosen"]["likelihood"] == ("a" if a > b else "b")
        assert row["right"]["likelihood"]["released"] == (row["chosen"]["likelihood"] == row["labels"]["released"])
    pairs = [
        x["right"]["likelihood"]["released"] and y["right"]["likelihood"]["released"] for x, y in zip(rows[::2], rows[1::2], strict=True)
    ]
    assert first["scores"]["likelihood"]["released"]["pair_accuracy"] == sum(pairs) / PAIRS
    settings = json.loads((out / "settings.json").read_text())
    identity = settings["identity"]
    assert identity["answerer"]["decoding"] == "greedy" and identity["prompt"] == "official"
    assert settings["format"] == first["format"] == 1 and settings["versions"].keys() == {"mof-vig", "torch", "transformers"}
    again = done(run(*arguments, "--output", out, "--batch-size", "3"), out)
    assert again["usage"]["asked"] == 0
    other = done(run(*arguments, "--output", tmp_path / "other", "--batch-size", "5"), tmp_path / "other")
    assert other["usage"]["asked"] == 2 * PAIRS
    assert (tmp_path / "other" / "answers.jsonl").read_text() == (out / "answers.jsonl").read_text()
    shared = done(run(*arguments, "--output", tmp_path / "third", "--cache", out / "cache.jsonl"), tmp_path / "third")
    assert shared["usage"]["asked"] == 0 and shared["scores"] == first["scores"]


@pytest.mark.slow
def test_an_endpoint_and_a_judge(tmp_path: Path, data: Path) -> None:
    def judge(body: Body) -> str:
        number = int(re.search(r"Number (\d+)", question_of(body))[1])
        return {1: "Maybe?", 2: "no"}.get(number, "Yes.")

    out = tmp_path / "run"
    with serve(answer_right, ["drop"]) as server, serve(judge, [(429, {}, b"")]) as court:
        arguments = (
            "mmvp", "--data", data, "--endpoint", server.url, "--model-name", "gpt-x", "--judge-endpoint", court.url,
            "--judge-model", "gpt-4", "--output", out, "--prompt", "letter",
        )  # fmt: skip
        shown = run(*arguments)
        result = done(shown, out)
        requests = len(server.requests), len(court.requests)
        assert requests == (4 * PAIRS, 4 * PAIRS)
        again = done(run(*arguments), out)
        assert (len(server.requests), len(court.requests)) == requests
    assert (result["pair_accuracy"], result["question_accuracy"]) == (1, 1)
    by_letter = result["scores"]["letter"]["released"]
    assert (by_letter["pair_accuracy"], by_letter["question_accuracy"]) == (0, 0.5)
    assert result["scores"]["judge"]["released"]["pair_accuracy"] == pytest.approx((PAIRS - 1) / PAIRS)
    agreed = result["judge"]["agreement"]
    assert (agreed["compared"], agreed["undecided"], agreed["kappa"]) == (23, 1, 0)
    assert agreed["share"] == pytest.approx(22 / 23) and result["judge"]["undecided"] == [1]
    assert (result["usage"]["input_tokens"], result["usage"]["output_tokens"]) == (24 * 100, 24 * 2)
    assert again["usage"] == result["usage"] | {"asked": 0, "asked_input_tokens": 0, "asked_output_tokens": 0}
    assert again["judge"]["usage"]["asked"] == 0
    for words in ("GPT-4V (published)", "38.7", "gpt-x (letter or text, released labels)", "100.0", "asked 24 of 24", "kappa 0.000"):
        assert words in shown.output
    assert all("Answer with the option's letter" in question_of(body) for body, _ in server.requests)
    assert "asked with the letter prompt" in result["deviations"]


def test_another_evaluation_is_refused_and_the_first_one_stays(tmp_path: Path, data: Path) -> None:
    out, changed = tmp_path / "run", tmp_path / "changed"
    shutil.copytree(data, changed)
    Image.new("RGB", (24, 24)).save(changed / "MMVP Images" / "3.jpg")
    with serve(answer_right) as server:
        arguments = ("mmvp", "--data", data, "--endpoint", server.url, "--model-name", "m", "--output", out)
        done(run(*arguments), out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        for more, named in (
            (("--prompt", "letter"), "prompt: 'official' there, 'letter' now"),
            (("--model-name", "other"), "answerer.model: 'm' there, 'other' now"),
            (("--max-new-tokens", "7"), "answerer.max_new_tokens: 256 there, 7 now"),
            (("--data", changed), "data: "),
        ):
            refused = run(*arguments, *more)
            assert refused.exit_code == 2 and named in refused.stderr, refused.output
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert len(server.requests) == 2 * PAIRS
        (out / "settings.json").unlink()
        assert run(*arguments).exit_code == 2  # results of an unknown evaluation
        shared = tmp_path / "shared"
        result = done(run(*arguments[:-1], shared, "--cache", out / "cache.jsonl"), shared)
        assert result["usage"]["asked"] == 0
        copied = tmp_path / "copied"
        copied.mkdir()
        shutil.copy(out / "cache.jsonl", copied)
        assert done(run(*arguments[:-1], copied), copied)["usage"]["asked"] == 0 and len(server.requests) == 2 * PAIRS


def test_a_folder_of_an_older_release_is_not_filled_but_still_joined(tmp_path: Path, data: Path) -> None:
    out, answers = tmp_path / "run", tmp_path / "answers.json"
    answers.write_text(json.dumps({str(i): "(a)" for i in range(1, 2 * PAIRS + 1)}))
    arguments = ("mmvp", "--data", data, "--answers", answers, "--output", out)
    result = done(run(*arguments), out)
    identity = json.loads((out / "settings.json").read_text())["identity"]
    old = {"benchmark": "mmvp", "answerer": identity["answerer"], "prompt": "official", "judge": None, "versions": {}}
    (out / "settings.json").write_text(json.dumps(old))
    (out / "result.json").write_text(json.dumps({name: value for name, value in result.items() if name not in ("format", "files")}))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused = run(*arguments)
    assert refused.exit_code == 2 and all(words in refused.stderr for words in (str(out), "--output", "mof eval report"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    joined = run("report", out, "-o", tmp_path / "report.html")
    assert joined.exit_code == 0 and "0.0" in joined.output and "50.0" in joined.output


def test_two_runs_at_once_do_not_share_a_folder(tmp_path: Path, data: Path) -> None:
    out, second = tmp_path / "run", []

    def reply(body: Body) -> str:
        if not second:
            second.append(run("mmvp", "--data", data, "--endpoint", server.url, "--model-name", "other", "--output", out))
        return answer_right(body)

    with serve(reply) as server:
        first = done(run("mmvp", "--data", data, "--endpoint", server.url, "--model-name", "m", "--output", out, "--concurrency", "1"), out)
        assert len(server.requests) == 2 * PAIRS
    assert second[0].exit_code == 2 and f"another run is writing to {out}" in second[0].stderr
    assert first["model"] == "m" and json.loads((out / "settings.json").read_text())["identity"]["answerer"]["model"] == "m"


def test_a_run_that_got_no_answer_leaves_the_folder_free(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    with serve(lambda _: (401, {}, b"wrong key")) as server:
        assert run("mmvp", "--data", data, "--endpoint", server.url, "--model-name", "typo", "--output", out).exit_code == 2
        server.reply = answer_right
        assert done(run("mmvp", "--data", data, "--endpoint", server.url, "--model-name", "m", "--output", out), out)["pair_accuracy"] == 1


@pytest.mark.slow
def test_a_judge_of_nonsense_agrees_with_nobody(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    with serve(answer_right) as server, serve(lambda _: "\u00bfqu\u00e9? {}") as court:
        result = done(
            run("mmvp", "--data", data, "--endpoint", server.url, "--model-name", "m", "--judge-endpoint", court.url,
                "--judge-model", "j", "--output", out), out
        )  # fmt: skip
    assert result["pair_accuracy"] == 1 and result["scores"]["judge"]["released"]["question_accuracy"] == 0
    assert result["judge"]["agreement"] == {"compared": 0, "undecided": 24, "share": None, "kappa": None}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_and_resumed(tmp_path: Path, data: Path) -> None:
    """kill -9 in the middle: what was answered is not asked again, and the result is that of a run in one go."""

    numbers, blocked, killed = itertools.count(1), threading.Semaphore(0), threading.Event()

    def held(body: Body) -> str:
        if next(numbers) > 6:
            blocked.release()
            assert killed.wait(600)
        return answer_right(body)

    out = tmp_path / "run"
    with serve(held) as server:
        arguments = ["eval", "mmvp", "--data", data, "--endpoint", server.url, "--model-name", "m", "--output", out, "--concurrency", "2"]
        command = [sys.executable, "-c", "from mof.cli.app import main; main()", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
        assert all(blocked.acquire(timeout=600) for _ in range(2)), process.poll()  # both that are under way
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed.set()
        assert not (out / "result.json").exists()
        cache = out / "cache.jsonl"
        kept, asked = cache.read_bytes().count(b"\n"), len(server.requests)
        assert (kept, asked) == (6, 8)
        with cache.open("ab") as file:
            file.write(b'{"key": "torn')
        result = done(run(*arguments[1:]), out)
        assert result["usage"]["asked"] == 2 * PAIRS - kept
        assert len(server.requests) == asked + 2 * PAIRS - kept  # only what was under way is asked twice
    assert result["pair_accuracy"] == 1


@pytest.mark.data
def test_finished_answers_to_the_real_questions(tmp_path: Path, shared_data: Path) -> None:
    with (shared_data / "mmvp" / "Questions.csv").open() as file:
        table = list(csv.DictReader(file))
    answers = [{"question_id": row["Index"], "answer": row["Correct Answer"], "response": row["Correct Answer"]} for row in table]
    for row in answers[0:20:2]:
        row["response"] = "(a) or (b)"
    (tmp_path / "old run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    out = tmp_path / "mmvp"
    shown = run("mmvp", "--data", shared_data / "mmvp", "--answers", tmp_path / "old run.jsonl", "--output", out)
    result = done(shown, out)
    assert (result["pair_accuracy"], result["question_accuracy"]) == (0.9, 0.95)
    corrected = result["scores"]["letter or text"]["corrected"]  # rows 99 and 100 are one pair
    assert (corrected["pair_accuracy"], corrected["question_accuracy"]) == (0.89, 0.94)
    assert result["corrected_rows"] == [99, 100] and result["unmatched"] == list(range(1, 20, 2))
    assert len(corrected["by_pattern"]) == 9 and sum(shares["pairs"] for shares in corrected["by_pattern"].values()) == 100
    assert "10 answers name no option or several, and count as wrong: 1, 3, 5" in shown.output
    assert "200 of 300 questions" in result["deviations"]

    (tmp_path / "old").mkdir()
    for name in ("random", "popular"):  # in the form of POPE's own answers
        (tmp_path / "old" / f"{name}.json").write_text('{"question": "?", "answer": "no"}\n' * 3000)
    result = done(
        run("pope", "--data", shared_data / "pope", "--answers", tmp_path / "old", "--output", tmp_path / "pope"), tmp_path / "pope"
    )
    assert (result["accuracy"], result["f1"], result["yes_ratio"], result["questions"]) == (0.5, 0, 0, 6000)
    assert any("adversarial" in note for note in result["deviations"])

    annotations = json.loads((shared_data / "coco" / "captions_train.json").read_text())["annotations"]
    captions = {row["image_id"]: {"image_id": row["image_id"], "caption": row["caption"]} for row in annotations}
    (tmp_path / "captions.json").write_text(json.dumps(list(captions.values())))
    files = ("--instances", shared_data / "coco" / "instances_train.json", "--captions", shared_data / "coco" / "captions_train.json")
    synonyms = ("--synonyms", shared_data / "chair" / "synonyms.txt")
    result = done(
        run("chair", *files, *synonyms, "--answers", tmp_path / "captions.json", "--output", tmp_path / "chair"), tmp_path / "chair"
    )
    assert (result["chair_i"], result["chair_s"], result["captions"]) == (0, 0, 80)


@pytest.mark.data
def test_captions_of_real_photos_by_an_endpoint(tmp_path: Path, shared_data: Path) -> None:
    out = tmp_path / "run"
    files = ("--instances", shared_data / "coco" / "instances_train.json", "--captions", shared_data / "coco" / "captions_train.json")
    rest = (
        "--synonyms",
        shared_data / "chair" / "synonyms.txt",
        "--images",
        shared_data / "coco" / "train2017",
        "--output",
        out,
        "--count",
        "7",
    )
    with serve(lambda _: "A zebra rides a bus.") as server:
        result = done(run("chair", *files, *rest, "--endpoint", server.url, "--model-name", "m"), out)
        assert len(server.requests) == 7
    rows = read_sealed_lines(out / "answers.jsonl")
    wrong = sum(name not in row["in_image"] for row in rows for name in ("zebra", "bus"))
    assert result["chair_i"] == wrong / 14 and result["mean_length"] == 5 and result["captions"] == 7


@pytest.mark.slow
def test_pope_by_an_endpoint(tmp_path: Path, data: Path) -> None:
    lines = [{"question_id": i, "image": f"{i}.jpg", "text": f"Number {i}: open?", "label": "yes" if i % 2 else "no"} for i in range(1, 9)]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "run"
    with serve(lambda body: "Yes." if "(a)" in answer_right(body) else "No, closed.") as server:
        asked = ("pope", "--data", tmp_path, "--images", data / "MMVP Images", "--model-name", "m")
        result = done(run(*asked, "--endpoint", server.url, "--output", out), out)
    assert (result["accuracy"], result["f1"], result["yes_ratio"]) == (1, 1, 0.5)
    with serve(lambda body: (400, {}, b"no") if "Number 4:" in question_of(body) else "No") as server:
        out = tmp_path / "other"
        result = done(run(*asked, "--endpoint", server.url, "--output", out), out)
    assert result["yes_ratio"] == 1 / 8 and "1 prompts were refused, such as random/4 (HTTP 400: no)" in str(result["deviations"])
    with serve(lambda body: "A dog!") as server:
        out = tmp_path / "third"
        result = done(run(*asked, "--endpoint", server.url, "--output", out), out)
    assert (
        result["neither"] == 8 and "8 of 8 answers say neither yes nor no: they count as yes by the released rule" in result["deviations"]
    )
    for outside in ("../secret.jpg", "/etc/passwd"):
        (tmp_path / "coco_pope_random.json").write_text(json.dumps(lines[0] | {"image": outside}))
        refused = run(*asked, "--endpoint", server.url, "--output", out)
        assert refused.exit_code == 2 and f"the image path '{outside}' leads out of the image folder" in refused.stderr
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    (data / "MMVP Images" / "3.jpg").unlink()
    refused = run(*asked, "--endpoint", server.url, "--output", out)
    assert refused.exit_code == 2 and "1 images are missing" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give one of --model"),
        (("--endpoint", "http://localhost:1/v1"), "--model-name"),
        (("--model", "a", "--answers", "b.json"), "give one of"),
        (("--model", "nothing"), "config.json"),
        (("--answers", "nothing.json"), "nothing.json"),
        (("--answers", "b.json", "--judge-model", "j"), "--judge-endpoint"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_said_in_one_line(tmp_path: Path, data: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run("mmvp", "--data", data, "--output", tmp_path / "run", *arguments)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--suite", "vig", "--model", "m", "--output", "o"), 'pip install "mof-vig[lmms]"'),
        (("--suite", "mof", "--via", "lmms-eval", "--out", "o"), "--suite with --model and --output"),
        (("--suite", "vig", "pope", "--data", "d", "--output", "o"), "give --suite or the command pope, not both"),
        (("--suite", "cambrian", "--model", "m", "--output", "o"), "vig"),
    ],
)
def test_suites_without_lmms_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    """The benchmarks that lmms-eval runs are tested with it, in test_lmms.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mof.evals.lmms.suites.find_spec", lambda name: None)
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "o").exists()


def test_photos_are_needed_to_ask_about(tmp_path: Path, data: Path) -> None:
    result = run("pope", "--data", data, "--output", tmp_path / "run", "--model", "m")
    assert result.exit_code == 2 and "--images" in result.stderr


@pytest.mark.parametrize(
    "arguments", [("eval", "--help"), ("eval", "chair", "--help"), ("eval", "report", "--help"), ("probe", "mmvp-vlm", "--help")]
)
def test_help_loads_no_slow_library(arguments: tuple[str, ...]) -> None:
    program = (
        "import sys; from mof.cli.app import build_app\n"
        "try: build_app({})(sys.argv[1:])\n"
        "finally: print({'torch', 'numpy', 'transformers', 'scipy', 'openai', 'PIL'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "set()"


def test_photos_stay_inside_their_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "instances.json").write_text(json.dumps({"annotations": [], "images": [{"id": 1, "file_name": "../secret.jpg"}]}))
    with pytest.raises(ImageError, match=r"'\.\./secret\.jpg'"):
        photos([tmp_path / "instances.json"], tmp_path / "photos", None)
    with pytest.raises(ImageError, match="'/etc/hostname'"):
        eval_pope(None, [PopeQuestion("random/1", "random", "/etc/hostname", "Is there a dog?", True)], tmp_path / "photos")
