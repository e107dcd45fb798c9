"""`mof eval encoders`: the worth of each encoder of a model, and of its images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from encoders.command_groups import resumes
from encoders.command_options import MODEL_HELP, DtypeName, MaxNewTokens, images_option, output_option, seed_option
from mof.evals.text_tables import TextTable

if TYPE_CHECKING:
    from mof.evals.encoder_worth import EncoderWorth


@resumes
def encoders(
    model: Annotated[Path, typer.Option(help=MODEL_HELP)],
    output: Annotated[Path, output_option("Folder for a run of the whole model, and a run for each line of the table.")],
    mmvp: Annotated[Path | None, typer.Option(help="Measure by MMVP: a folder as `mof eval mmvp --data` takes it.")] = None,
    prompt: Annotated[
        Literal["official", "letter", "question"], typer.Option(help="With --mmvp: the prompt, as `mof eval mmvp` takes it.")
    ] = "official",
    pope: Annotated[Path | None, typer.Option(help="Measure by POPE: a folder as `mof eval pope --data` takes it.")] = None,
    images: Annotated[Path | None, images_option("With --pope: folder of the photos.")] = None,
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
    """
    from rich.console import Console

    from encoders.images.opening import inside
    from mof.evals.answerers import LocalModel
    from mof.evals.encoder_worth import encoder_worth
    from mof.evals.run import Run

    if (mmvp is None) == (pope is None) or (pope is None) != (images is None):
        raise ValueError("give either --mmvp FOLDER, or --pope FOLDER with --images FOLDER")
    measurement: Any
    if mmvp is not None:
        from mof.evals.mmvp import eval_mmvp, read_mmvp

        questions = read_mmvp(mmvp)
        pictures = [str(question.image) for question in questions]
        measurement = lambda run: eval_mmvp(run, questions, prompt)  # noqa: E731
    else:
        from mof.evals.pope import eval_pope, read_pope

        assert pope is not None and images is not None
        asked = read_pope(pope)
        pictures = [str(inside(images, question.image)) for question in asked]
        measurement = lambda run: eval_pope(run, asked, images)  # noqa: E731
    local = LocalModel.load(model, dtype=dtype, batch_size=batch_size, max_new_tokens=max_new_tokens)
    run = Run(output, local, progress=True, name=name, seed=seed)
    result = encoder_worth(local, measurement, list(dict.fromkeys(pictures)), output, replacement=replacement, run=run)
    Console().print(*worth_tables(result, name or local.name))


def worth_tables(result: EncoderWorth, name: str) -> list[TextTable | str]:
    """Return the table of scores and rates, a table of rates by pattern if there are patterns, and the information gap."""
    others = {f"without {encoder}": worth for encoder, worth in result.encoders.items()}
    others |= {f"{picture} images": worth for picture, worth in result.pictures.items()}
    rows = {name: [f"{100 * result.score:.1f}", "-", "-", "-", "-"]}
    for line, worth in others.items():
        losses, rates = worth.loss.interval, worth.rate_interval  # no space: a cell would break there
        rows[line] = [
            f"{100 * worth.score:.1f}",
            f"{100 * worth.loss.value:.1f}",
            f"[{100 * losses[0]:.1f},{100 * losses[1]:.1f}]",
            f"{worth.rate:.2f}",
            f"[{rates[0]:.2f},{rates[1]:.2f}]",
        ]
    columns = ("score", "lost", "95 %", "utilisation rate", "95 %")
    tables: list[TextTable | str] = [TextTable(f"{result.measure}, %", columns, rows)]
    patterns = [pattern for pattern, share in result.patterns.items() if share > 0]
    if patterns:
        by_pattern = {line: [f"{worth.patterns[pattern]:.2f}" for pattern in patterns] for line, worth in others.items()}
        tables.append(TextTable("utilisation rate by pattern", tuple(patterns), by_pattern))
    if len(result.encoders) > 1:
        tables.append(f"information gap: {result.information_gap:.2f}, the largest utilisation rate of an encoder minus the smallest")
    return tables
