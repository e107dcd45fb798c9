"""The sub-commands `mof vig ...`: parse arguments and call the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
import typer
from accelerate import PartialState
from transformers import AutoModelForImageTextToText

from mof.data.rows import read_rows
from vig.cli.analyses import attention_command, image_match_command, misleading_command
from vig.cli.report import report_command
from vig.nulls import NULL_NAMES
from vig.saved_models import load_processor, stored_images
from vig.scoring.folder import REJECTED
from vig.scoring.run import score
from vig.scoring.scores import load_scores
from vig.selection.random_control import Level, random_selection
from vig.selection.sources import record_sources
from vig.selection.thresholds import select

app = typer.Typer(
    help="Visual information gain: score records, select what to train on.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.command("report")(report_command)
app.command("image-match")(image_match_command)
app.command("attention")(attention_command)
app.command("misleading")(misleading_command)

Records = Annotated[Path, typer.Option(help="Records in LLaVA's form or chat messages, .json or .jsonl.")]


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
    only_image: Annotated[
        int | None, typer.Option(min=0, help="Of several images replace this one only, counted from 0; by default all together.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the null images 'noise' and 'shuffle'.")] = 0,
    features: Annotated[Path | None, typer.Option(help="Store of `mof encode --model`: the encoders are then not run.")] = None,
    blurred_features: Annotated[Path | None, typer.Option(help="Store of `mof encode --model --blurred`, with --features.")] = None,
) -> None:
    """Measure how much the image helped each answer token of each record.

    \b
    Example:
      mof vig score --model runs/mof --records data/train.json --image-folder data/images --output-dir runs/scores
    \b
    On several GPUs, each with a share of the records; killed, it goes on with the same command, or with another number of them:
      torchrun --no-python --nproc_per_node 8 mof vig score --model runs/mof --records data/train.json --image-folder data/images \\
        --output-dir runs/scores
    """
    if (features is None) != (blurred_features is None):
        raise ValueError("--features and --blurred-features go together: the score compares the two")
    if not image_folder.is_dir():
        raise ValueError(f"{image_folder} is no folder: --image-folder is what the records' image paths are relative to")
    processor = load_processor(model)
    raw = read_rows(records)
    network = AutoModelForImageTextToText.from_pretrained(model)
    process = PartialState(cpu=not torch.accelerator.is_available())
    network.to(process.device)
    stored = None
    if features is not None and blurred_features is not None:
        stored = stored_images(network, processor, features), stored_images(network, processor, blurred_features, blurred=True)
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
        only_image=only_image,
        stored_images=stored,
        seed=seed,
    )
    if process.is_main_process:
        failed = f"{len(scores.failures)} failed" + (f", listed in {output_dir / REJECTED}" if scores.failures else "")
        texts = f"{len(scores.manifest['text_only'])} without an image, "
        typer.echo(f"{len(scores)} of {len(raw)} records scored in {output_dir}, {texts}{failed}")


@app.command("select")
def select_command(
    scores: Annotated[Path, typer.Option(help="Folder that `mof vig score` wrote.")],
    records: Records,
    output: Annotated[Path, typer.Option(help="JSON file for the selected records, each with its token_mask.")],
    keep: Annotated[float, typer.Option(help="Share of the samples to keep, in [0, 1].")] = 0.7,
    threshold: Annotated[float | None, typer.Option(help="VIG from which samples are kept, in place of --keep.")] = None,
    token_threshold: Annotated[
        str, typer.Option(help="VIG from which tokens are supervised: a number, 'shared' (that of the samples) or 'none' (all).")
    ] = "shared",
    token_keep: Annotated[
        float | None, typer.Option(help="Share of the kept samples' answer tokens to supervise, in place of --token-threshold.")
    ] = None,
    end_of_turn: Annotated[bool, typer.Option(help="Supervise the ends of turns whatever their VIG.")] = True,
    source_key: Annotated[
        str | None, typer.Option(help="Key of a record that says its source; 'image' for the top folder of its image.")
    ] = None,
    quota: Annotated[
        list[str] | None, typer.Option(help="Least share to keep of each source, as 0.3, or of one, as ocr_vqa=0.5; may be repeated.")
    ] = None,
    random: Annotated[
        str | None, typer.Option(help="Draw as many tokens at random instead: whole 'samples', 'tokens' of all samples, or 'both'.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --random.")] = 0,
    weights: Annotated[
        tuple[float, float] | None, typer.Option(help="Weigh tokens by their VIG between these two, in place of a hard mask.")
    ] = None,
) -> None:
    """Keep the records, and in them the answer tokens, that the image helped most.

    \b
    Example:
      mof vig select --scores runs/scores --records data/train.json --keep 0.7 --output data/selected.json
    \b
    At least 30 % of each source, told apart by image folder:
      mof vig select --scores runs/scores --records data/train.json --keep 0.7 --source-key image --quota 0.3 --output data/selected.json
    """
    if output.resolve() == records.resolve():
        raise ValueError(f"--output {output} would overwrite the --records; give another file")
    raw = read_rows(records)
    selection = select(
        load_scores(scores),
        keep,
        threshold=threshold,
        token_keep=token_keep,
        token_threshold=_token_threshold(token_threshold),
        keep_end_of_turn=end_of_turn,
        sources=None if source_key is None else record_sources(raw, source_key),
        quota=_quota(quota or [], source_key),
    )
    if random is not None:
        selection = random_selection(selection.scores, selection, seed, cast(Level, random))
    if weights is not None:
        selection = selection.weighted(*weights)
    kept = selection.apply(raw)
    output.write_text(json.dumps(kept))
    typer.echo(f"{selection.summary()}\n{len(kept)} of {len(raw)} records written to {output}")


def _token_threshold(text: str) -> float | Literal["shared"] | None:
    if text == "shared":
        return "shared"
    return None if text == "none" else _number("--token-threshold", text)


def _quota(texts: list[str], source_key: str | None) -> float | dict[str, float]:
    """["0.3"] -> 0.3; ["a=0.3", "b=0.5"] -> {"a": 0.3, "b": 0.5}."""
    if texts and source_key is None:
        raise ValueError("--quota needs --source-key, which says what the sources are")
    if len(texts) == 1 and "=" not in texts[0]:
        return _number("--quota", texts[0])
    pairs = [text.rpartition("=") for text in texts]
    if not all(name for name, _, _ in pairs):
        raise ValueError(f"--quota takes one share for all sources or NAME=SHARE for some; got {' '.join(texts)}")
    return {name: _number("--quota", share) for name, _, share in pairs} if pairs else 0.0


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is no number") from None
