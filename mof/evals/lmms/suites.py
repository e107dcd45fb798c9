"""lmms-eval runs these benchmarks of the two papers, task by task, and gives their figures."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from encoders.console import Console
from encoders.runs import versions
from encoders.whole_files import write_sealed_lines
from mof.evals.answerers.api_keys import OPENAI_KEY, key_for, without_key
from mof.evals.benchmark import Measure, Measured, Row
from mof.evals.intervals import Given
from mof.evals.run import FORMAT, claimed_folder, decoding_note, row_name, write_result

NAME = "lmms-eval"
MEASURES = {
    "mmhal_bench mmhal_score": Measure("MMHal-Bench", "score, 0 to 6", "a judge rates how informative and true answers are", scale=1),
    "mmhal_bench mmhal_rate": Measure("MMHal-Bench", "hallucinated, %", "answers that the judge rates below 3", "lower"),
    "llava_in_the_wild gpt_eval_llava_all": Measure(
        "LLaVA-Bench", "relative score, %", "a judge's points, in % of the points of GPT-4's answers", scale=1
    ),
    "mmvet gpt_eval_score": Measure("MM-Vet", "score, %", "a judge grades open answers", scale=1),
    "mmbench_en_dev_static gpt_eval_score": Measure(
        "MMBench dev", "circular accuracy, %", "right in every rotation of the options; chosen letters are found by rule", scale=1
    ),
    "docvqa_val anls": Measure("DocVQA val", "ANLS, %", "likeness of letters to the nearest right answer, 0 below a half"),
    "docvqa_val accuracy": Measure("DocVQA val", "accuracy, %", "answers equal to a right answer, apart from case and white space"),
    "gqa exact_match": Measure("GQA", "accuracy, %", "answers equal to the right answer"),
    "scienceqa_img exact_match": Measure("ScienceQA, images", "accuracy, %", "right letters, of the questions with an image"),
    "cv_bench cv_bench_acc": Measure("CV-Bench", "accuracy, %", "right letters over all questions"),
    "mmvp mmvp_pair_accuracy": Measure("MMVP by lmms-eval", "right pairs, %", "pairs with both questions right", chance=0.25),
    "mmvp_vlm_choice mmvp_vlm_pairs": Measure(
        "MMVP-VLM, asked", "right pairs, %", "pairs of photos, each with the right of two statements", chance=0.25
    ),
    "naturalbench naturalbench_G_ACC": Measure("NaturalBench", "group accuracy, %", "two photos with two questions, all four right"),
    "blink blink_acc": Measure("BLINK", "accuracy, %", "right letters over all questions"),
    "mmstar average": Measure("MMStar", "accuracy, %", "right letters, the mean over categories"),
    "realworldqa exact_match": Measure("RealWorldQA", "accuracy, %", "answers equal to the right answer"),
    "vstar_bench vstar_overall_acc": Measure("V*", "accuracy, %", "right letters about small things in large photos", scale=1),
    "hallusion_bench_image aAcc": Measure("HallusionBench", "accuracy, %", "a judge says whether single answers are right", scale=1),
    "hallusion_bench_image qAcc": Measure("HallusionBench", "right questions, %", "right for all photos of the question", scale=1),
    "pope pope_accuracy": Measure("POPE by lmms-eval", "accuracy, %", "right answers, yes or no", chance=0.5),
    "pope pope_yes_ratio": Measure("POPE by lmms-eval", "yes, %", "share of yes among the answers; half are right", ""),
    "amber_d amber_accuracy": Measure("AMBER, discriminative", "accuracy, %", "right answers, yes or no"),
    "amber_d amber_f1": Measure("AMBER, discriminative", "F1, %", "of the answer no, which names a hallucination"),
    "vismin vismin_text": Measure("VisMin", "text, %", "pairs of photos with the right caption of each", chance=0.25),
    "vismin vismin_image": Measure("VisMin", "image, %", "pairs of captions with the right photo of each", chance=0.25),
    "vismin vismin_group": Measure("VisMin", "group, %", "pairs with all four questions right", chance=1 / 16),
}
"""A measure is called by its task and its metric."""
HEADLINE = "", ""
SUITES = {
    "vig": (
        "mmhal_bench", "llava_in_the_wild", "mmvet", "mmbench_en_dev_static", "docvqa_val", "gqa", "scienceqa_img", "cv_bench",
    ),
    "mof": ("llava_in_the_wild", "mmbench_en_dev_static", "gqa", "scienceqa_img"),
    "vision": (
        "mmvp", "mmvp_vlm_choice", "cv_bench", "naturalbench", "blink", "mmstar", "realworldqa", "vstar_bench", "hallusion_bench_image",
        "pope", "amber_d", "vismin",
    ),
}  # fmt: skip
"""The tasks of each paper besides MMVP, POPE and CHAIR, which `mof eval` runs itself; and the benchmarks of seeing, these included."""
JUDGED = {"mmhal_bench", "llava_in_the_wild", "mmvet", "hallusion_bench_image"}
DEVIATIONS = {
    "mmhal_bench": "mmhal_bench: the judge's wording is ours",
    "mmbench_en_dev_static": "mmbench_en_dev_static: letters are found by rule; the official run asks gpt-3.5-turbo",
    "mmvp_vlm_choice": "mmvp_vlm_choice: two statements are options of a question; the official run compares embeddings",
    "amber_d": "amber_d: asked with 'Please answer Yes or No.'; the first yes or no of an answer counts",
    "cv_bench": "cv_bench: mean over questions; the official score is the mean of its 2D and 3D halves",
}
JUDGE = "gpt-4o-2024-11-20"  # lmms-eval's default; the variable MODEL_VERSION names another


def measured(result: Row, rows: list[Row]) -> Measured:
    counts = {row["task"]: row["samples"] for row in result["figures"]}
    basis = ", ".join(f"{task}: {count} questions" for task, count in counts.items())
    return Measured(basis, {f"{row['task']} {row['metric']}": Given(row["value"], row["error"]) for row in result["figures"]})


@dataclass(frozen=True)
class SuiteRun:
    """SuiteRun holds the model that is measured, and the folder of its results."""

    model: Path
    out: Path
    name: str | None = None
    seed: int | None = None
    dtype: str = "float32"
    batch_size: int = 8
    limit: int | None = None
    """Number of documents per task, for a trial."""
    decoding: str | None = None
    """NAME[:OPTION=VALUE...] of a decoding method; None is plain decoding."""


def run_suite(suite: str, run: SuiteRun, console: Console) -> Row:
    """Run each task of the suite by lmms-eval; write result.json, answers/TASK.jsonl per task, and cache.jsonl.

    A task that cannot be run, because its data or a judge is missing, is reported, and the others go on.

    Raises:
        ValueError: without lmms-eval, for a folder without a model, for a folder of another evaluation, or if no task could be
            run; result.json then tells why.
    """
    if find_spec("lmms_eval") is None:
        raise ValueError('suites are run by lmms-eval, which is not installed: pip install "mof-vig[lmms]"')
    from mof.evals.lmms.model import MofLmms

    options: dict[str, Any] = {"dtype": run.dtype, "batch_size": run.batch_size, "decoding": run.decoding}
    model = MofLmms(str(run.model), cache=str(run.out / "cache.jsonl"), **options)
    judge = os.environ.get("MODEL_VERSION", JUDGE)
    with claimed_folder(run.out, benchmark=NAME, suite=suite, answerer=model.settings, judge=judge, limit=run.limit):
        return _measure(suite, run, model, judge, console)


def _measure(suite: str, run: SuiteRun, model: Any, judge: str, console: Console) -> Row:
    """Run each task, and write and return the result."""
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("WARNING", include_path=str(files("mof.evals.lmms").joinpath("tasks")), model_name="mof")
    figures: list[Row] = []
    failed: dict[str, str] = {}
    for task in SUITES[suite]:
        try:
            figures += _run_task(task, model, run, manager)
        except Exception as error:  # lmms-eval and datasets raise errors of many types; other tasks may still run
            cause = error.__cause__ or error  # behind lmms-eval's RetryError
            failed[task] = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
            console.print(f"{task}: not run ({failed[task]})", style="yellow")
    ran = list(dict.fromkeys(figure["task"] for figure in figures))
    judged = [task for task in ran if task in JUDGED]
    deviations = [f"by lmms-eval {versions('lmms_eval')['lmms_eval']}, with its prompts; {decoding_note(model.settings['decoding'])}"]
    deviations += [DEVIATIONS[task] for task in ran if task in DEVIATIONS]
    deviations += [f"{', '.join(judged)}: judged by {judge}"] if judged else []
    deviations += [f"the first {run.limit} questions of each"] if run.limit is not None else []
    unanswered = model.unanswered.items()
    deviations += [f"{task}: {len(why)} prompts without an answer, counted as empty answers ({why[0][:200]})" for task, why in unanswered]
    deviations += [f"not run: {', '.join(failed)}"] if failed else []
    result = {
        "format": FORMAT, "benchmark": NAME, "suite": suite, "seed": run.seed,
        "model": row_name(run.name or str(run.model), model.settings["decoding"]), "decoding": model.settings["decoding"],
        "figures": figures, "failed": failed, "deviations": deviations,
    }  # fmt: skip
    write_result(run.out, result)
    if not figures:
        raise ValueError(f"no task of the suite {suite} could be run; {run.out / 'result.json'} tells why, task by task")
    return result


def _run_task(task: str, model: Any, run: SuiteRun, manager: Any) -> list[Row]:
    """Run one task; return its figures as lmms-eval gives them."""
    from lmms_eval.evaluator import simple_evaluate

    if task in JUDGED:
        _check_judge()
    arguments = argparse.Namespace(output_path=str(run.out), process_with_media=False)
    measured = simple_evaluate(
        model, tasks=[task], task_manager=manager, limit=run.limit, bootstrap_iters=0, cli_args=arguments, verbosity="WARNING",
        batch_size=run.batch_size,
    )  # fmt: skip
    samples = [sample for of_task in measured["samples"].values() for sample in of_task]  # a group such as blink has several tasks
    folder = run.out / "answers"
    folder.mkdir(exist_ok=True)
    rows = [{"id": sample["doc_id"], "target": sample["target"], "answer": sample["filtered_resps"][0]} for sample in samples]
    write_sealed_lines(folder / f"{task}.jsonl", json.loads(json.dumps(rows, default=str)))
    values = {key.partition(",")[0]: value for key, value in measured["results"][task].items() if isinstance(value, (int, float))}
    if task == "docvqa_val":
        right = [_plain(row["answer"]) in {_plain(target) for target in row["target"]} for row in rows]
        values |= {"accuracy": sum(right) / len(right)}
    metrics = [key.partition(" ")[2] for key in MEASURES if key.startswith(f"{task} ")]
    if missing := [metric for metric in metrics if metric not in values]:
        raise ValueError(f"lmms-eval gave no {', '.join(missing)}; it gave {', '.join(values)}")
    return [
        {"task": task, "metric": metric, "value": values[metric], "error": values.get(f"{metric}_stderr_clt"), "samples": len(samples)}
        for metric in metrics
    ]


def _check_judge() -> None:
    """Ask the judge before hours of answers: tasks of lmms-eval give 0 points if the judge does not reply."""
    from lmms_eval.llm_judge import Request, ServerConfig, get_server

    if not os.environ.get(OPENAI_KEY):
        raise ValueError("needs a judge: set OPENAI_API_KEY, and OPENAI_API_URL and MODEL_VERSION for another than OpenAI's")
    key = key_for(os.environ.get("OPENAI_API_URL", "https://api.openai.com/v1"), OPENAI_KEY)
    config = ServerConfig(model_name=os.environ.get("MODEL_VERSION", JUDGE), max_tokens=8, num_retries=1)
    try:
        get_server(os.environ.get("API_TYPE", "openai"), config).evaluate(Request([{"role": "user", "content": "Say yes."}], config=config))
    except Exception as error:  # whatever the client raises
        raise ValueError(f"the judge does not reply ({type(error).__name__}: {without_key(str(error), key)})") from None


def _plain(answer: str) -> str:
    return " ".join(answer.casefold().split())


def rows_of(figures: Sequence[Row]) -> dict[str, list[str]]:
    """Return the rows of a table: measure -> value and number of questions."""
    shown = {}
    for figure in figures:
        measure = MEASURES[f"{figure['task']} {figure['metric']}"]
        shown[f"{measure.benchmark}, {measure.title}"] = [f"{measure.scale * figure['value']:.1f}", str(figure["samples"])]
    return shown
