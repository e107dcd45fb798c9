"""`mof eval`: models, endpoints and finished answers measured on MMVP, POPE and CHAIR."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mof.cli.answerer_options import AnswererOptions, takes_answerer
from mof.cli.report import correlation, report
from mof.cli.suite import suite
from mof.evals.chair import CocoWords, read_coco, read_objects
from mof.evals.mmvp import LABELS, read_mmvp
from mof.evals.pope import read_pope
from mof.evals.published import MMVP
from mof.evals.run import Result, eval_chair, eval_mmvp, eval_pope

evaluate = typer.Typer(no_args_is_help=True, invoke_without_command=True, rich_markup_mode=None, pretty_exceptions_enable=False)
evaluate.callback()(suite)
evaluate.command()(report)
evaluate.command()(correlation)
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]


@evaluate.command()
@takes_answerer
def mmvp(
    answerer: AnswererOptions,
    data: Annotated[Path, typer.Option(help="Folder with Questions.csv and the images; finished answers need no images.")],
    prompt: Annotated[
        Literal["official", "letter", "question"], typer.Option(help="letter asks for the option's letter, too; question names no options.")
    ] = "official",
    patterns: Annotated[Path | None, typer.Option(help="File of ids and patterns, where Questions.csv has no category.")] = None,
    judge_endpoint: Annotated[str | None, typer.Option(help="OpenAI-compatible URL of a judge, beside matching by rule.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="What that endpoint calls the judge.")] = None,
    max_new_tokens: MaxNewTokens = 256,
) -> None:
    """Share of MMVP's pairs answered rightly, beside the published ones; chance is 25 %.

    \b
    Example:
      mof eval mmvp --data MMVP --model runs/mof --out evals/mof-mmvp
    """
    if (judge_endpoint is None) != (judge_model is None):
        raise ValueError("give both --judge-endpoint and --judge-model, or neither")
    questions = read_mmvp(data, patterns, images=answerer.answers is None)
    judge = None
    if judge_endpoint is not None and judge_model is not None:
        judge = answerer.endpoint_of(judge_endpoint, judge_model, max_new_tokens=16)
    result = eval_mmvp(answerer.run(max_new_tokens), questions, prompt, judge)
    ways = {
        f"{way}, {labels} labels": [by[labels]["pair_accuracy"], by[labels]["question_accuracy"]]
        for way, by in result["scores"].items()
        for labels in LABELS
    }
    headline = f"{result['model']} ({result['matched_by']}, released labels)"
    published = {f"{name} (published)": [share / 100] for name, share in MMVP.items()}
    patterns_of = result["scores"][result["matched_by"]]["released"]["by_pattern"]
    console = Console()
    console.print(_table("MMVP, %", ("right pairs",), published | {headline: [result["pair_accuracy"]]}))
    console.print(_table(f"{result['model']}, answers matched by", ("right pairs", "right questions"), ways))
    if patterns_of:
        rows = {name: [one["pair_accuracy"], one["question_accuracy"]] for name, one in patterns_of.items()}
        console.print(_table(f"{result['model']}, by pattern", ("right pairs", "right questions"), rows))
    if result["unmatched"]:
        console.print(f"{len(result['unmatched'])} answers name no option or several, and count as wrong: {_some(result['unmatched'])}")
    if "judge" in result:
        console.print(_agreement(result["judge"]))
    _close(console, result, answerer.out)


@evaluate.command()
@takes_answerer
def pope(
    answerer: AnswererOptions,
    data: Annotated[Path, typer.Option(help="Folder with question files such as coco_pope_random.json.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the photos; finished answers need none.")] = None,
    max_new_tokens: MaxNewTokens = 64,
) -> None:
    """Whether objects are in photos, yes or no. Finished answers are a folder of random.jsonl and so on, or a file with ids like random/17.

    \b
    Example:
      mof eval pope --data pope --images val2014 --model runs/mof --out evals/mof-pope
    """
    if images is None and answerer.answers is None:
        raise ValueError("give --images, the folder of the photos")
    questions = read_pope(data)
    result = eval_pope(answerer.run(max_new_tokens), questions, None if answerer.answers is not None else images)
    columns = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    rows = {name: [one[column] for column in columns] for name, one in result["scores"].items()}
    console = Console()
    console.print(_table(f"POPE, {result['model']}, %", columns, rows))
    _close(console, result, answerer.out)


@evaluate.command()
@takes_answerer
def chair(
    answerer: AnswererOptions,
    instances: Annotated[list[Path], typer.Option(help="COCO's instances file; may be given again.")],
    captions: Annotated[list[Path], typer.Option(help="COCO's captions file; may be given again.")],
    synonyms: Annotated[Path, typer.Option(help="One line per class, of synonyms parted by commas: CHAIR's synonyms.txt.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the photos; finished answers need none.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Describe only so many of the photos, drawn with seed 0.")] = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Please describe this image in detail.",
    max_new_tokens: MaxNewTokens = 512,
) -> None:
    """Share of the objects in captions that are not in the photos. In files of finished answers the ids are COCO's.

    \b
    Example:
      mof eval chair --instances instances.json --captions captions.json --synonyms synonyms.txt --images val2014 --model runs/mof --out run
    """
    if images is None and answerer.answers is None:
        raise ValueError("give --images, the folder of the photos")
    words = CocoWords(synonyms)
    objects = read_objects(words, instances, captions)
    files = None if images is None or answerer.answers is not None else _photos(instances, images, count)
    result = eval_chair(answerer.run(max_new_tokens), words, objects, files, prompt)
    console = Console()
    console.print(_table("CHAIR, %", ("CHAIR i", "CHAIR s"), {result["model"]: [result["chair_i"], result["chair_s"]]}))
    length, mentions = result["mean_length"], result["mentions_per_caption"]
    console.print(f"{result['captions']} captions of {length:.1f} words with {mentions:.1f} objects on average")
    _close(console, result, answerer.out)


def _photos(instances: Sequence[Path], folder: Path, count: int | None) -> dict[str, Path]:
    """File by image id, of the photos that are in the folder."""
    listed = [image for file in instances for image in read_coco(file, "category_id").get("images", [])]
    files = {str(image["id"]): folder / image["file_name"] for image in listed}
    found = {id: file for id, file in files.items() if file.is_file()}
    if not found or (count is not None and count > len(found)):
        raise ValueError(f"{folder} holds {len(found)} of the {len(files)} photos that {instances[0]} lists; wanted {count or 'some'}")
    chosen = sorted(found) if count is None else random.Random(0).sample(sorted(found), count)
    return {id: found[id] for id in chosen}


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> Table:
    """Shares in [0, 1] as percentages."""
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, values in rows.items():
        table.add_row(name, *("-" if value is None else f"{100 * value:.1f}" for value in values))
    return table


def _agreement(judge: Result) -> str:
    found = judge["agreement"]
    share = "-" if found["share"] is None else f"{100 * found['share']:.1f} %"
    kappa = "undefined" if found["kappa"] is None else f"{found['kappa']:.3f}"
    compared, undecided = found["compared"], found["undecided"]
    return f"judge {judge['model']}: agrees with the rule on {share} of {compared} answers (kappa {kappa}), {undecided} undecided"


def _some(ids: Sequence[object]) -> str:
    return ", ".join(map(str, ids[:20])) + (", ..." if len(ids) > 20 else "")


def _close(console: Console, result: Result, out: Path) -> None:
    for note in result["deviations"]:
        console.print(f"- {note}")
    for name, usage in (("", result["usage"]), ("judge: ", result.get("judge", {}).get("usage"))):
        if usage is not None:
            cost = f", cost {usage['cost']:.4f}, of which now {usage['asked_cost']:.4f}" if "cost" in usage else ""
            console.print(
                f"{name}asked {usage['asked']} of {usage['answers']} prompts, the others were kept; "
                f"{usage['input_tokens']} tokens read, {usage['output_tokens']} written{cost}"
            )
    console.print(f"written to {out}")
