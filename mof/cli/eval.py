"""`mof eval` measures models, endpoints and finished answers on MMVP, POPE and CHAIR, or by the suites of lmms-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from encoders.command_groups import command_group, resumes
from encoders.command_options import (
    MODEL_HELP,
    ClusterOptions,
    DecodingName,
    DtypeName,
    MaxNewTokens,
    images_option,
    output_option,
    seed_option,
)
from encoders.names import first_names
from mof.cli.answerer_options import AnswererOptions
from mof.evals.published import MMVP
from mof.evals.text_tables import TextTable, percent_table, show_result

DESCRIBE = "Please describe this image in detail."  # CHAIR prescribes no words
PhotoFolder = Annotated[Path | None, images_option("Folder of the photos. Finished answers need none.")]


@resumes
def mmvp(
    data: Annotated[Path, typer.Option(help="Folder with Questions.csv and the images; finished answers need no images.")],
    prompt: Annotated[
        Literal["official", "letter", "question"],
        typer.Option(help="letter: also ask for the letter. question: leave out the options."),
    ] = "official",
    patterns: Annotated[Path | None, typer.Option(help="File of ids and patterns, if Questions.csv has no category.")] = None,
    judge_endpoint: Annotated[str | None, typer.Option(help="OpenAI-compatible URL of a judge, beside matching by rule.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="That endpoint's name for the judge.")] = None,
    judge_key_variable: Annotated[str | None, typer.Option(help="Like --key-variable, for the judge's endpoint.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    *,
    answerer: AnswererOptions,
    cluster: ClusterOptions,
) -> None:
    """Measure the share of MMVP's pairs that are answered rightly, beside published shares; chance is 25 %.

    \b
    Example:
      mof eval mmvp --data MMVP --model runs/mof --output evals/mof-mmvp
    \b
    On all GPUs of this machine, or of a Ray cluster with its address:
      mof eval mmvp --data MMVP --model runs/mof --output evals/mof-mmvp --ray
    """
    from mof.evals.mmvp import LABELS, eval_mmvp, read_mmvp

    if (judge_endpoint is None) != (judge_model is None):
        raise ValueError("give both --judge-endpoint and --judge-model, or neither")
    questions = read_mmvp(data, patterns, images=answerer.answers is None)
    judge = None
    if judge_endpoint is not None and judge_model is not None:
        judge = answerer.endpoint_of(judge_endpoint, judge_model, 16, judge_key_variable)
    result = eval_mmvp(answerer.run(max_new_tokens, cluster), questions, prompt, judge)
    ways = {
        f"{way}, {labels} labels": [by[labels]["pair_accuracy"], by[labels]["question_accuracy"]]
        for way, by in result["scores"].items()
        for labels in LABELS
    }
    headline = f"{result['model']} ({result['matched_by']}, released labels)"
    published = {f"{name} (published)": [share / 100] for name, share in MMVP.items()}
    patterns_of = result["scores"][result["matched_by"]]["released"]["by_pattern"]
    columns = ("right pairs", "right questions")
    lines: list[Any] = [
        percent_table("MMVP, %", columns[:1], published | {headline: [result["pair_accuracy"]]}),
        percent_table(f"{result['model']}, answers matched by", columns, ways),
    ]
    if patterns_of:
        rows = {name: [shares["pair_accuracy"], shares["question_accuracy"]] for name, shares in patterns_of.items()}
        lines.append(percent_table(f"{result['model']}, by pattern", columns, rows))
    if unmatched := result["unmatched"]:
        ids = first_names([str(id) for id in unmatched])
        lines.append(f"{len(unmatched)} answers name no option or several, and count as wrong: {ids}")
    if "judge" in result:
        lines.append(_agreement(result["judge"]))
    show_result(result, answerer.output, *lines)


@resumes
def pope(
    data: Annotated[Path, typer.Option(help="Folder with question files such as coco_pope_random.json.")],
    images: PhotoFolder = None,
    max_new_tokens: MaxNewTokens = 64,
    *,
    answerer: AnswererOptions,
    cluster: ClusterOptions,
) -> None:
    """Ask whether objects are in photos, yes or no.

    Finished answers are a folder of random.jsonl and so on, or a file with ids like random/17.

    \b
    Example:
      mof eval pope --data pope --images val2014 --model runs/mof --output evals/mof-pope
    """
    if images is None and answerer.answers is None:
        raise ValueError("give --images, the folder of the photos")
    from mof.evals.pope import eval_pope, read_pope

    questions = read_pope(data)
    result = eval_pope(answerer.run(max_new_tokens, cluster), questions, None if answerer.answers is not None else images)
    columns = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    rows = {name: [score[column] for column in columns] for name, score in result["scores"].items()}
    show_result(result, answerer.output, percent_table(f"POPE, {result['model']}, %", columns, rows))


@resumes
def chair(
    instances: Annotated[list[Path], typer.Option(help="COCO's instances file. Can be given several times.")],
    captions: Annotated[list[Path], typer.Option(help="COCO's captions file. Can be given several times.")],
    synonyms: Annotated[Path, typer.Option(help="One line per class, of synonyms separated by commas: CHAIR's synonyms.txt.")],
    images: PhotoFolder = None,
    count: Annotated[int | None, typer.Option(min=1, help="Describe only this many of the photos, drawn with seed 0.")] = None,
    prompt: Annotated[str, typer.Option(help="The question about each photo.")] = DESCRIBE,
    max_new_tokens: MaxNewTokens = 512,
    *,
    answerer: AnswererOptions,
    cluster: ClusterOptions,
) -> None:
    """Measure the share of the objects in captions that are not in the photos.

    The ids in files of finished answers are COCO's.

    \b
    Example:
      mof eval chair --instances instances.json --captions captions.json --synonyms synonyms.txt --images val2014 --model runs/mof -o run
    """
    if images is None and answerer.answers is None:
        raise ValueError("give --images, the folder of the photos")
    from mof.evals.answerers import AnswersFile
    from mof.evals.chair import CocoWords, eval_chair, photos, read_objects

    words = CocoWords(synonyms)
    objects = read_objects(words, instances, captions)
    run = answerer.run(max_new_tokens, cluster)
    if isinstance(run.answerer, AnswersFile):
        result = eval_chair(run, words, objects, dict.fromkeys(run.answerer.answers), None)
    else:
        assert images is not None
        result = eval_chair(run, words, objects, photos(instances, images, count), prompt)
    table = percent_table("CHAIR, %", ("CHAIR i", "CHAIR s"), {result["model"]: [result["chair_i"], result["chair_s"]]})
    length, mentions = result["mean_length"], result["mentions_per_caption"]
    line = f"{result['captions']} captions of {length:.1f} words with {mentions:.1f} objects on average"
    show_result(result, answerer.output, table, line)


def suite(
    context: typer.Context,
    suite: Annotated[
        Literal["vig", "mof", "vision"] | None,
        typer.Option(
            help="vig, mof: the paper's benchmarks besides MMVP, POPE and CHAIR. vision: benchmarks of seeing, from MMVP to AMBER."
        ),
    ] = None,
    via: Annotated[str | None, typer.Option(hidden=True)] = None,  # ignored; had one value, and goes with the next release
    model: Annotated[Path | None, typer.Option(help=MODEL_HELP)] = None,
    output: Annotated[Path | None, output_option("With --suite: folder for cache, answers and result.")] = None,
    name: Annotated[str | None, typer.Option(help="With --suite: the model's name in tables.")] = None,
    seed: Annotated[int | None, seed_option("With --suite: the model's seed of training.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --suite: prompts at a time.")] = 8,
    dtype: Annotated[DtypeName, typer.Option(help="With --suite: precision of the model.")] = "float32",
    limit: Annotated[int | None, typer.Option(min=1, help="With --suite: only this many questions per benchmark, for a trial.")] = None,
    decoding: DecodingName = None,
) -> None:
    """Measure models, endpoints or finished answers: by a command below, or by a suite that lmms-eval runs.

    A suite needs the extra lmms. Its data sets come from the hub, or from folders with their names, such as nyu-visionx/CV-Bench,
    below the current folder.

    \b
    Example:
      mof eval --suite vig --model runs/mof --output evals/mof-vig
    """
    if context.invoked_subcommand is not None:
        if suite is not None:
            raise ValueError(f"give --suite or the command {context.invoked_subcommand}, not both")
        return
    if suite is None or model is None or output is None:
        raise ValueError("give a command such as mmvp, or --suite with --model and --output")
    from encoders.console import Console
    from mof.evals.lmms.suites import SuiteRun, rows_of, run_suite

    result = run_suite(suite, SuiteRun(model, output, name, seed, dtype, batch_size, limit, decoding), Console())
    title = f"{result['model']}, suite {suite} by lmms-eval"
    show_result(result, output, TextTable(title, ("value", "questions"), rows_of(result["figures"]), "benchmark"))


def _agreement(judge: dict[str, Any]) -> str:
    agreed = judge["agreement"]
    share = "-" if agreed["share"] is None else f"{100 * agreed['share']:.1f} %"
    kappa = "undefined" if agreed["kappa"] is None else f"{agreed['kappa']:.3f}"
    compared, undecided = agreed["compared"], agreed["undecided"]
    return f"judge {judge['model']}: agrees with the rule on {share} of {compared} answers (kappa {kappa}), {undecided} undecided"


evaluate = command_group(
    {
        "mmvp": mmvp,
        "pope": pope,
        "chair": chair,
        "encoders": "mof.cli.encoder_worth:encoders",
        "report": "mof.cli.report:report",
        "correlation": "mof.cli.report:correlation",
    },
    callback=suite,
    alone=True,
)
