"""The sub-commands `mof vig ...`: parse arguments and call the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

from mof.records import read_records
from vig.nulls import NULL_NAMES
from vig.scores import load_scores
from vig.scoring import score
from vig.selection import select

app = typer.Typer(
    help="Visual information gain: score records, select what to train on.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Records = Annotated[Path, typer.Option(help="Records in LLaVA's form, .json or .jsonl.")]


@app.command("score")
def score_command(
    model: Annotated[Path, typer.Option(help="Folder of any saved image-text-to-text model with its processor.")],
    records: Records,
    image_folder: Annotated[Path, typer.Option(help="What the records' image paths are relative to.")],
    output_dir: Annotated[Path, typer.Option(help="Where the scores go; an interrupted run there is resumed.")],
    null: Annotated[str, typer.Option(help=f"What takes the image's place: {', '.join(NULL_NAMES)}.")] = "blur",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass; halved when memory runs out.")] = 16384,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per forward pass, at most.")] = 64,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens; longer records are cut as in training.")] = 2048,
) -> None:
    """Measure how much the image helped each answer token of each record.

    \b
    Example:
      mof vig score --model runs/mof --records data/train.json --image-folder data/images --output-dir runs/scores
    """
    if not (model / "config.json").is_file():  # or transformers takes a mistyped folder for a name on the hub
        raise ValueError(f"{model} holds no config.json: expected a folder that save_pretrained wrote")
    raw = read_records(records)
    network = AutoModelForImageTextToText.from_pretrained(model)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    scores = score(
        network,
        AutoProcessor.from_pretrained(model),
        raw,
        output_dir,
        null,
        image_folder=image_folder,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        max_length=max_length,
    )
    typer.echo(f"{len(scores)} of {len(raw)} records scored in {output_dir}, {len(scores.failures)} failed")


@app.command("select")
def select_command(
    scores: Annotated[Path, typer.Option(help="Folder that `mof vig score` wrote.")],
    records: Records,
    output: Annotated[Path, typer.Option(help="JSON file for the selected records, each with its token_mask.")],
    keep: Annotated[float, typer.Option(help="Share of the samples to keep, in [0, 1].")] = 0.7,
) -> None:
    """Keep the records, and in them the answer tokens, that the image helped most.

    \b
    Example:
      mof vig select --scores runs/scores --records data/train.json --keep 0.7 --output data/selected.json
    """
    selection = select(load_scores(scores), keep)
    output.write_text(json.dumps(selection.apply(read_records(records))))
    typer.echo(str(selection.summary()))
