"""The sub-commands `mof vig ...`: parse arguments and call the library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from encoders import FeatureStore, StoredImages
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
    features: Annotated[Path | None, typer.Option(help="Store of `mof encode --model`: the encoders are then not run.")] = None,
    blurred_features: Annotated[Path | None, typer.Option(help="Store of `mof encode --model --blurred`, with --features.")] = None,
) -> None:
    """Measure how much the image helped each answer token of each record.

    \b
    Example:
      mof vig score --model runs/mof --records data/train.json --image-folder data/images --output-dir runs/scores
    """
    if not (model / "config.json").is_file():  # or transformers takes a mistyped folder for a name on the hub
        raise ValueError(f"{model} holds no config.json: expected a folder that save_pretrained wrote")
    if (features is None) != (blurred_features is None):
        raise ValueError("--features and --blurred-features go together: the score compares the two")
    raw = read_records(records)
    processor = AutoProcessor.from_pretrained(model)
    network = AutoModelForImageTextToText.from_pretrained(model)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    stored = None
    if features is not None and blurred_features is not None:
        stored = _stored(network, processor, features, False), _stored(network, processor, blurred_features, True)
    scores = score(
        network,
        processor,
        raw,
        output_dir,
        null,
        image_folder=image_folder,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        max_length=max_length,
        stored_images=stored,
    )
    typer.echo(f"{len(scores)} of {len(raw)} records scored in {output_dir}, {len(scores.failures)} failed")


def _stored(model: PreTrainedModel, processor: ProcessorMixin, store: Path, blurred: bool) -> StoredImages:
    if model.config.model_type != "mof":
        raise ValueError(f"a feature store serves models of this library, not a {model.config.model_type} model")
    view = replace(processor.image_processor.view, blurred=blurred)
    return StoredImages(FeatureStore(store, list(model.mixer.encoders)), model.mixer.encoders, view)


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
