"""`mof eval encoders` measures the worth of each encoder of a model, and the worth of its images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from encoders.command_groups import resumes
from encoders.command_options import MODEL_HELP, DtypeName, MaxNewTokens, images_option, output_option, seed_option
from mof.evals.text_tables import TextTable

if TYPE_CHECKING:
    from mof.evals.encoder_worth import EncoderWorth, Measurement, Worth

GAP = "the largest utilisation rate of an encoder minus the smallest"
Asked = tuple["Measurement", list[str]]
"""A benchmark, and its images."""


@resumes
def encoders(
    model: Annotated[Path, typer.Option(help=MODEL_HELP)],
    output: Annotated[Path, output_option("Folder for a run of the whole model, and a run for each line of the table.")],
    mmvp: Annotated[Path | None, typer.Option(help="Measure by MMVP: a folder as `mof eval mmvp --data` takes it.")] = None,
    prompt: Annotated[
        Literal["official", "letter", "question"], typer.Option(help="With --mmvp: the prompt, as `mof eval mmvp` takes it.")
    ] = "official",
    pope: Annotated[Path | None, typer.Option(help="Measure by POPE: a folder as `mof eval pope --data` takes it.")] = None,
    instances: Annotated[
        list[Path] | None, typer.Option(help="Measure by CHAIR: COCO's instances file. Can be given several times.")
    ] = None,
    captions: Annotated[list[Path] | None, typer.Option(help="With --instances: COCO's captions file. Can be given several times.")] = None,
    synonyms: Annotated[Path | None, typer.Option(help="With --instances: CHAIR's synonyms.txt.")] = None,
    records: Annotated[Path | None, typer.Option(help="Measure by the VIG of held-out captions: a file of records.")] = None,
    images: Annotated[Path | None, images_option("Folder of the photos, for all but --mmvp.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="With --instances: only this many of the photos, drawn with seed 0.")] = None,
    replacement: Annotated[
        Literal["mean", "zero", "mask"],
        typer.Option(help="What stands in place of an encoder's tokens: their mean over images, zeros, or nothing (mask)."),
    ] = "mean",
    name: Annotated[str | None, typer.Option(help="The model's name in tables. Default: its folder.")] = None,
    seed: Annotated[int | None, seed_option("The model's seed of training.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    dtype: Annotated[DtypeName, typer.Option(help="Precision. In 16 bits, the batch size may change answers.")] = "float32",
    max_new_tokens: MaxNewTokens = 64,
) -> None:
    """Measure what each encoder of a mixture is worth: the benchmark is asked again without the encoder.

    The utilisation rate is the share of the score that is lost. A rate below 0 means that the model is better without the encoder.
    The lines "blurred" and "swapped" show what the score owes to the images at all: rates near 0 mean that the model ignores them.

    \b
    Example:
      mof eval encoders --model runs/mof --mmvp MMVP --output evals/mof-encoders
      mof eval encoders --model runs/mof --records held-out.json --images data/images --output evals/mof-encoders-vig
    """
    from encoders.console import Console
    from mof.evals.answerers import LocalModel
    from mof.evals.encoder_worth import encoder_worth
    from mof.evals.run import Run

    given = [source for source in (mmvp, pope, instances, records) if source]
    if len(given) != 1 or (images is None) != (mmvp is not None):
        raise ValueError("give one of --mmvp, --pope, --instances and --records, the last three with --images, the folder of the photos")
    if mmvp is not None:
        measurement, pictures = _by_mmvp(mmvp, prompt)
    elif pope is not None:
        measurement, pictures = _by_pope(pope, images)
    elif records is not None:
        measurement, pictures = _by_captions(records, images)
        max_new_tokens = 1  # captions are read, not written
    elif not captions or synonyms is None:
        raise ValueError("--instances needs --captions and --synonyms, as in `mof eval chair`")
    else:
        measurement, pictures = _by_chair(instances, captions, synonyms, images, count)
    local = LocalModel.load(model, dtype=dtype, batch_size=batch_size, max_new_tokens=max_new_tokens)
    run = Run(output, local, progress=True, name=name, seed=seed)
    result = encoder_worth(local, measurement, list(dict.fromkeys(pictures)), output, replacement=replacement, run=run)
    Console().print(*worth_tables(result, name or local.name))


def _by_mmvp(folder: Path, prompt: str) -> Asked:
    from mof.evals.mmvp import eval_mmvp, read_mmvp

    questions = read_mmvp(folder)
    return lambda run: eval_mmvp(run, questions, prompt), [str(question.image) for question in questions]


def _by_pope(folder: Path, images: Any) -> Asked:
    from encoders.images.opening import inside
    from mof.evals.pope import eval_pope, read_pope

    questions = read_pope(folder)
    return lambda run: eval_pope(run, questions, images), [str(inside(images, question.image)) for question in questions]


def _by_chair(instances: Any, captions: list[Path], synonyms: Path, images: Any, count: int | None) -> Asked:
    from mof.cli.eval import DESCRIBE
    from mof.evals.chair import CocoWords, eval_chair, photos, read_objects

    words = CocoWords(synonyms)
    objects, shown = read_objects(words, instances, captions), photos(instances, images, count)
    return lambda run: eval_chair(run, words, objects, shown, DESCRIBE), list(map(str, shown.values()))


def _by_captions(file: Path, images: Any) -> Asked:
    from mof.data.rows import read_rows
    from mof.evals.captions import eval_captions, read_captions

    captions = read_captions(read_rows(file), images)
    return lambda run: eval_captions(run, captions), [image for caption in captions for image in caption.images]


def worth_tables(result: EncoderWorth, name: str) -> list[TextTable | str]:
    """Return the table of scores and rates, the same for each pattern or strategy, and the information gap."""
    others = {f"without {encoder}": worth for encoder, worth in result.encoders.items()}
    others |= {f"{picture} images": worth for picture, worth in result.pictures.items()}
    tables: list[TextTable | str] = [_table(result.measure, result.scale, name, result.score, others)]
    for part, score in result.parts.items():
        own = {line: worth.parts[part] for line, worth in others.items()}
        tables.append(_table(f"{part}: {result.measure}", result.scale, name, score, own))
    if len(result.encoders) > 1:
        gap = result.information_gap
        told = "none, as there are no utilisation rates for a score that is not above 0" if math.isnan(gap) else f"{gap:.2f}, {GAP}"
        tables.append(f"information gap: {told}")
    return tables


def _table(title: str, scale: float, name: str, score: float, others: dict[str, Worth]) -> TextTable:
    digits = 1 if scale > 1 else 3
    rows = {name: [f"{scale * score:.{digits}f}", "-", "-", "-", "-"]}
    for line, worth in others.items():
        losses, rates = worth.loss.interval, worth.rate_interval  # no space: a cell would break there
        rows[line] = [
            f"{scale * worth.score:.{digits}f}",
            f"{scale * worth.loss.value:.{digits}f}",
            f"[{scale * losses[0]:.{digits}f},{scale * losses[1]:.{digits}f}]",
            "-" if math.isnan(worth.rate) else f"{worth.rate:.2f}",
            "-" if math.isnan(rates[0]) else f"[{rates[0]:.2f},{rates[1]:.2f}]",  # rich reads "[nan,nan]" as a tag
        ]
    return TextTable(title, ("score", "lost", "95 %", "utilisation rate", "95 %"), rows)
