"""lmms-eval runs a tiny model of ours on tiny data sets of the benchmarks' own layouts. Skipped where lmms-eval is not installed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.commands import mof
from support.stand_in import Body, question_of, serve
from typer.testing import Result

from mof.evals.answerers import LocalModel
from mof.evals.answering import Answer, Prompt

pytest.importorskip("lmms_eval")
import datasets
from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from mof.evals.lmms.model import MofLmms, cut

COUNT = 6
ORIGIN = "lmms-lab-encoder"  # where lmms-eval takes most data sets from


def photos() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(COUNT)]


def write(place: Path, config: str, split: str, columns: dict[str, list[Any]]) -> None:
    """A data set of one config and split as the hub lays it out; more configs of a place are added."""
    place.mkdir(parents=True, exist_ok=True)
    made = datasets.Dataset.from_dict(columns)
    for name, values in columns.items():
        if isinstance(values[0], Image.Image):
            made = made.cast_column(name, datasets.Image())
    made.to_parquet(place / f"{config}-{split}.parquet")
    listed = place / "configs.json"
    configs = json.loads(listed.read_text()) if listed.exists() else []
    configs.append({"config_name": config, "data_files": [{"split": split, "path": f"{config}-{split}.parquet"}]})
    listed.write_text(json.dumps(configs))
    (place / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


def instances(count: int, length: int, until: list[str], target: Callable[[Any], str] | str | None = None) -> tuple[list[Instance], Any]:
    """Requests and the documents that they are about, as lmms-eval hands them over."""
    documents = [{"image": image, "text": f"What is this? {i}"} for i, image in enumerate(photos()[:count])]

    def to_visual(document: dict[str, Any]) -> list[Image.Image]:
        return [document["image"]]

    kind = "generate_until" if target is None else "loglikelihood"
    made = []
    for i, document in enumerate(documents):
        second = {"max_new_tokens": length + i % 2, "until": until} if target is None else target
        arguments = (document["text"], second, to_visual, i, "t", "test")
        made.append(Instance(kind, arguments, 0, {"task": "t", "doc_id": i, "repeats": 1}))
    return made, {"t": {"test": documents}}


def test_a_batch_size_is_a_number(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size.*'auto:4'"):
        MofLmms(str(tiny_folder), batch_size="auto:4")


def test_the_entry_point_is_what_lmms_eval_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = re.search(
        r'\[project.entry-points."lmms_eval.models"\]\nmof = "([^"]+)"', (Path(__file__).parents[2] / "pyproject.toml").read_text()
    )
    assert declared is not None
    registry = ModelRegistryV2()
    point = EntryPoint("mof", declared[1], "lmms_eval.models")
    monkeypatch.setattr(registry, "_select_entry_points", lambda group: [point] if group == "lmms_eval.models" else [])
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("mof") is MofLmms


def test_texts_are_those_of_the_answerer(tiny_folder: Path) -> None:
    model = MofLmms.create_from_arg_string(f"pretrained={tiny_folder}", {"batch_size": 4, "max_batch_size": None})
    requests, model.task_dict = instances(5, 7, ["\n\n"])
    results = model.generate_until(requests)
    for i, (request, result) in enumerate(zip(requests, results, strict=True)):
        answerer = LocalModel.load(tiny_folder, batch_size=1, max_new_tokens=7 + i % 2)
        prompt = Prompt.about("x", model.task_dict["t"]["test"][i]["image"], request.args[0])
        (_, alone), *_ = answerer.answer([prompt])
        assert result.text == alone.text.split("\n\n")[0].strip()
        assert result.token_counts.output_tokens == alone.output_tokens <= 7 + i % 2 and result.token_counts.input_tokens > 0


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [("a b ASSISTANT: c", ["ASSISTANT:"], "a b"), ("a;b.c", [".", ";"], "a"), ("abc", None, "abc"), ("abc", "b", "a"), ("abc", [""], "abc")],
)  # fmt: skip
def test_answers_end_at_stops(text: str, stops: Any, left: str) -> None:
    assert cut(text, stops) == left


def test_losses_are_negative_log_likelihoods(tiny_folder: Path) -> None:
    model = MofLmms(str(tiny_folder), batch_size=2)
    requests, model.task_dict = instances(3, 0, [], target=lambda document: f"answer {len(document['text'])}")
    for request, (loss, greedy) in zip(requests, model.loglikelihood(requests), strict=True):
        answerer = LocalModel.load(tiny_folder, batch_size=1, max_new_tokens=1)
        document = model.document(request)
        option = f"answer {len(document['text'])}"
        (_, alone), *_ = answerer.answer([Prompt.about("x", document["image"], request.args[0], (option,))])
        assert alone.log_likelihoods is not None
        assert loss == pytest.approx(-alone.log_likelihoods[0], rel=1e-5) and loss > 0 and greedy is False
    text = model.generate_until(instances(1, 4, [])[0])[0].text
    requests, _ = instances(1, 0, [], target=text)
    assert model.loglikelihood(requests)[0][1] is True and model.loglikelihood([]) == []


def test_answers_are_kept(tiny_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    first = MofLmms(str(tiny_folder), cache=str(cache))
    requests, first.task_dict = instances(4, 5, [])
    texts = first.generate_until(requests)
    cache.write_bytes(b"\n".join(cache.read_bytes().splitlines()[:-1]) + b'\n{"key": "to')  # killed while the last was written
    second = MofLmms(str(tiny_folder), cache=str(cache))
    second.task_dict = first.task_dict
    assert second.generate_until(requests) == texts
    assert cache.read_bytes().count(b'"answer"') == 4


def test_what_it_does_not_take(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MofLmms(str(tiny_folder))
    model.task_dict = instances(1, 5, [])[1]
    video = Instance("generate_until", ("?", {}, lambda _: ["film.mp4"], 0, "t", "test"), 0, {"task": "t", "doc_id": 0, "repeats": 1})
    with pytest.raises(ValueError, match="task t "):
        model.generate_until([video])
    with pytest.raises(ValueError, match=r"config.json"):
        MofLmms(str(tiny_folder / "nothing"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        MofLmms(str(tiny_folder))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny copies of the data sets, in the folder where it is run."""
    place = tmp_path / "data"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    texts = [f"question {i}" for i in range(COUNT)]
    answers = list("ABABAB")
    write(place / "nyu-visionx/CV-Bench", "default", "test", {
        "idx": list(range(COUNT)), "type": ["2D"] * COUNT, "task": ["Count"] * COUNT, "source": ["COCO"] * COUNT, "image": photos(),
        "choices": [["1", "2"]] * COUNT, "answer": [f"({letter})" for letter in answers], "prompt": texts,
    })  # fmt: skip
    write(place / ORIGIN / "ScienceQA", "ScienceQA-IMG", "test", {
        "image": photos(), "question": texts, "choices": [["x", "y"]] * COUNT, "answer": [0, 1] * 3, "hint": [""] * COUNT,
    })  # fmt: skip
    write(place / ORIGIN / "DocVQA", "DocVQA", "validation", {
        "questionId": [str(i) for i in range(COUNT)], "question": texts, "answers": [[f"Answer  {i}", "other"] for i in range(COUNT)],
        "image": photos(),
    })  # fmt: skip
    ids = [str(i) for i in range(COUNT)]
    write(
        place / ORIGIN / "GQA", "testdev_balanced_instructions", "testdev", {"imageId": ids, "question": texts, "answer": ["yes"] * COUNT}
    )
    write(place / ORIGIN / "GQA", "testdev_balanced_images", "testdev", {"id": ids, "image": photos()})
    circular = [i % 3 + 1_000_000 * (i // 3) for i in range(COUNT)]  # three questions, each in two rotations
    write(place / ORIGIN / "MMBench", "en", "dev", {
        "index": circular, "question": texts, "hint": [""] * COUNT, "image": photos(), "answer": answers, "category": ["c"] * COUNT,
        "L2-category": ["d"] * COUNT, "source": ["s"] * COUNT, "split": ["dev"] * COUNT,
        **{letter: [letter.lower()] * COUNT for letter in "AB"}, **{letter: ["nan"] * COUNT for letter in "CD"},
    })  # fmt: skip
    write(place / ORIGIN / "llava-bench-in-the-wild", "default", "train", {
        "question_id": ids, "question": texts, "image": photos(), "caption": ["a cat"] * COUNT, "gpt_answer": ["long"] * COUNT,
        "category": ["conv", "detail", "complex"] * 2,
    })  # fmt: skip
    write(place / ORIGIN / "MMVet", "default", "test", {
        "question_id": ids, "question": texts, "answer": ["a<AND>b"] * COUNT, "image": photos(), "image_source": ids,
        "capability": ["ocr,math"] * COUNT,
    })  # fmt: skip
    hal = place / "MMHal-Bench"
    (hal / "images").mkdir(parents=True)
    for i, photo in enumerate(photos()):
        photo.save(hal / "images" / f"{i}.jpg")
    (hal / "response_template.json").write_text(json.dumps([
        {"question": texts[i], "gt_answer": "a cat", "image_content": ["cat", "mat"], "image_src": f"https://host/{i}.jpg"}
        for i in range(COUNT)
    ]))  # fmt: skip
    return place


def suite(*arguments: str | Path) -> Result:
    return mof("eval", *arguments, COLUMNS="250")


def test_a_suite(tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right answers are counted here from the answers that were written; the model's own are nonsense, so some are put in."""
    genuine = LocalModel.answer

    def answer(self: LocalModel, prompts: list[Prompt]) -> Any:
        for place, answer in genuine(self, prompts):
            words = prompts[place].messages[0]["content"][-1]["text"]
            number = int(re.search(r"question (\d)", words)[1])
            text = {0: "A", 1: "B", 2: " answer 2 ", 3: "yes"}.get(number, "nothing")
            yield place, type(answer)(text, answer.log_likelihoods, answer.input_tokens, answer.output_tokens)

    monkeypatch.setattr(LocalModel, "answer", answer)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    judged: list[str] = []

    def judge(body: Body) -> str:
        words = question_of(body)
        if "Compare the ground truth" in words:
            return "0.5"
        if "[Context]" in words:
            return "8 6\nbecause"
        if "Rating: N" not in words:
            return "yes"
        judged.append(words)
        number = int(re.search(r"question (\d)", words)[1])
        return {0: "Rating: 6", 1: "Fine, so: **Rating: 2**", 2: "I say Rating: 1, no,\nRating: 4"}.get(number, "No idea.")

    out = tmp_path / "out"
    with serve(judge) as server:
        monkeypatch.setenv("OPENAI_API_URL", server.url)
        shown = suite("--suite", "vig", "--model", tiny_folder, "--output", out, "--name", "tiny", "--seed", "3")
    assert shown.exit_code == 0, shown.output
    result = json.loads((out / "result.json").read_text())
    values = {f"{figure['task']} {figure['metric']}": figure["value"] for figure in result["figures"]}
    assert result["failed"] == {}
    assert values["llava_in_the_wild gpt_eval_llava_all"] == 75 and values["mmvet gpt_eval_score"] == pytest.approx(50)
    assert values["scienceqa_img exact_match"] == pytest.approx(2 / 6)
    assert values["cv_bench cv_bench_acc"] == pytest.approx(3 / 6)  # lmms-eval takes the first letter of "answer 2" for (A)
    assert values["docvqa_val anls"] >= values["docvqa_val accuracy"] == pytest.approx(1 / 6)
    assert values["gqa exact_match"] == pytest.approx(1 / 6)
    assert values["mmbench_en_dev_static gpt_eval_score"] == 0  # 0 and 3 are one question: A is right, "yes" is not
    assert values["mmhal_bench mmhal_score"] == pytest.approx((6 + 2 + 4) / 6) and values["mmhal_bench mmhal_rate"] == pytest.approx(4 / 6)
    assert len(judged) == COUNT and "cat, mat" in judged[0] and "a cat" in judged[0]
    assert (result["model"], result["seed"]) == ("tiny", 3)
    assert "mmhal_bench, llava_in_the_wild, mmvet: judged by gpt-4o-2024-11-20" in result["deviations"]
    assert "CV-Bench, accuracy, %" in shown.stdout and "33.3" in shown.stdout

    joined = suite("report", out, "-o", tmp_path / "r.html")
    assert joined.exit_code == 0, joined.output
    line = (tmp_path / "r.csv").read_text().splitlines()
    cells = dict(zip(line[0].replace('"', "").split(","), line[1].split(","), strict=False))
    assert cells["model"] == "tiny" and "33.3333" in line[1] and "16.6667" in line[1]


def test_without_data_or_judge_every_task_says_why(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is built, lmms-eval is set going, and what is missing is the data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("mof.evals.lmms.suites.SUITES", {"mof": ("llava_in_the_wild", "cv_bench")})
    built = []
    genuine = MofLmms.__init__
    monkeypatch.setattr(MofLmms, "__init__", lambda self, *a, **b: (genuine(self, *a, **b), built.append(self))[0])
    shown = suite("--suite", "mof", "--model", tiny_folder, "--output", tmp_path / "out")
    assert shown.exit_code == 2 and "no task of the suite mof could be run" in shown.stderr and len(built) == 1
    failed = json.loads((tmp_path / "out" / "result.json").read_text())["failed"]
    assert "set OPENAI_API_KEY" in failed["llava_in_the_wild"] and "nyu-visionx/CV-Bench" in failed["cv_bench"]
    joined = suite("report", tmp_path / "out")
    assert joined.exit_code == 2 and "no figures" in joined.stderr


def test_a_judge_that_does_not_reply_is_no_judge(tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setattr("mof.evals.lmms.suites.SUITES", {"mof": ("mmhal_bench",)})
    with serve(lambda _: (401, {}, b"{}")) as server:
        monkeypatch.setenv("OPENAI_API_URL", server.url)
        shown = suite("--suite", "mof", "--model", tiny_folder, "--output", tmp_path / "out")
    assert shown.exit_code == 2
    assert "the judge does not reply" in json.loads((tmp_path / "out" / "result.json").read_text())["failed"]["mmhal_bench"]


def test_the_command_needs_what_it_needs(tiny_folder: Path) -> None:
    refused = suite("--suite", "vig", "--model", tiny_folder)
    assert refused.exit_code == 2 and "--suite with --model and --output" in refused.stderr


SOURCES = {
    "mmvp": "lmms-lab-eval/MMVP", "mmvp_vlm_choice": "MMVP_VLM/Questions.csv", "cv_bench": "nyu-visionx/CV-Bench",
    "naturalbench": "BaiqiL/NaturalBench-lmms-eval", "blink": "BLINK-Benchmark/BLINK", "mmstar": "Lin-Chen/MMStar",
    "realworldqa": "RealWorldQA", "vstar_bench": "vstar-bench", "hallusion_bench_image": "HallusionBench", "pope": "POPE",
    "amber_d": "query_discriminative.json", "vismin": "mair-lab/vismin-bench",
}  # fmt: skip


def test_every_task_of_the_suite_vision_gets_as_far_as_its_data(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mof.evals.lmms.suites import SUITES

    assert tuple(SOURCES) == SUITES["vision"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mof.evals.lmms.suites._check_judge", lambda: None)
    shown = suite("--suite", "vision", "--model", tiny_folder, "--output", tmp_path / "out")
    assert shown.exit_code == 2 and "no task of the suite vision could be run" in shown.stderr
    failed = json.loads((tmp_path / "out" / "result.json").read_text())["failed"]
    assert {task: place for task, place in SOURCES.items() if place not in failed[task]} == {}, failed


def test_our_own_tasks_of_the_suite_vision(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right answers are known here: the answerer below sees only the photo's number in its width."""
    place = tmp_path / "data"
    (place / "MMVP_VLM" / "MLLM_VLM Images" / "State").mkdir(parents=True)
    (place / "AMBER" / "data" / "query").mkdir(parents=True)
    (place / "AMBER" / "image").mkdir()
    shades = [Image.new("RGB", (30 + i, 20), (40 * i, 0, 0)) for i in range(4)]
    rows = ["Question ID,Type,Statement", *(f"{i + 1},State,statement {i + 1}" for i in range(4))]
    (place / "MMVP_VLM" / "Questions.csv").write_text("\n".join(rows))
    queries, annotations = [], [{"id": 1, "type": "generative", "truth": ["tree"]}]
    for i, image in enumerate(shades):
        image.save(place / "MMVP_VLM" / "MLLM_VLM Images" / "State" / f"{i + 1}.jpg")
        image.save(place / "AMBER" / "image" / f"AMBER_{i}.jpg")
        queries.append({"id": 1005 + i, "image": f"AMBER_{i}.jpg", "query": "Is there a cat in this image?"})
        annotations.append({"id": 1005 + i, "type": "discriminative-hallucination", "truth": "no" if i else "yes"})
    (place / "AMBER" / "data" / "query" / "query_discriminative.json").write_text(json.dumps(queries))
    (place / "AMBER" / "data" / "annotations.json").write_text(json.dumps(annotations))
    kinds = {f"text_question_{k}": ["<image_0> Does it show A) x or B) y?"] * 2 for k in (0, 1)}
    kinds |= {f"image_question_{k}": ["<image_0> <image_1> Which shows it, the First or the Second?"] * 2 for k in (0, 1)}
    answers = {"text_answer_0": ["A"] * 2, "text_answer_1": ["B"] * 2, "image_answer_0": ["First."] * 2, "image_answer_1": ["Second."] * 2}
    images = {"image_0": [shades[0], shades[2]], "image_1": [shades[1], shades[3]]}
    write(place / "mair-lab/vismin-bench", "default", "test", {"category": ["object"] * 2, **images, **kinds, **answers})
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("mof.evals.lmms.suites.SUITES", {"vision": ("mmvp_vlm_choice", "amber_d", "vismin")})
    asked: list[str] = []

    def answer(self: LocalModel, prompts: list[Prompt]) -> Any:
        for i, prompt in enumerate(prompts):
            words, seen = prompt.messages[0]["content"][-1]["text"], [image.size[0] - 30 for image in prompt.images]
            asked.append(words)
            if "Which statement" in words:
                text = "(b)" if seen[0] == 1 else "(a)"  # pair 1 is right, pair 2 is not
            elif "cat" in words:
                text = {0: "Yes.", 1: "No, there is none.", 2: "yes"}.get(seen[0], "Perhaps.")
            elif "A)" in words:
                text = "(B) y" if seen[0] in (1, 3) else "A"
            else:
                text = "first" if len(asked) % 2 else "Second"
            yield i, Answer(text)

    monkeypatch.setattr(LocalModel, "answer", answer)
    shown = suite("--suite", "vision", "--model", tiny_folder, "--output", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    values = {f"{figure['task']} {figure['metric']}": figure["value"] for figure in result["figures"]}
    assert result["failed"] == {}
    assert values["mmvp_vlm_choice mmvp_vlm_pairs"] == 0.5
    assert values["amber_d amber_accuracy"] == 0.5 and values["amber_d amber_f1"] == pytest.approx(2 * 1 / (3 + 1))
    assert values["vismin vismin_text"] == 1 and values["vismin vismin_group"] == values["vismin vismin_image"] <= 1
    assert "Which statement describes the image? (a) statement 1 (b) statement 2" in asked[0]
    assert "Is there a cat in this image? Please answer Yes or No." in asked and not any("<image" in words for words in asked)
