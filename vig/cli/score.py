"""`mof vig score` measures how much the image helped each answer token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import PartialState

from encoders.command_groups import resumes
from encoders.command_options import ClusterOptions, Images, Model, Records, TrustRemoteCode, output_option, seed_option
from encoders.digests import file_digest
from encoders.saved_models import load_network, load_processor
from encoders.terminal import say
from mof.data.rows import read_rows
from vig.nulls import NULL_NAMES
from vig.saved_models import stored_images
from vig.scoring import run
from vig.scoring.calibration import diagnosis
from vig.scoring.folder import RECORDS_DIGEST, REJECTED, file_of, refuse_occupied
from vig.scoring.score_table import MEASURES


@resumes
def score(
    model: Model,
    records: Records,
    images: Images,
    output: Annotated[Path, output_option("Folder of the scores. A run that was stopped there is resumed.", urls=True)],
    null: Annotated[str, typer.Option(help=f"The image that replaces each image: {', '.join(NULL_NAMES)}.")] = "blur",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass. Halved when memory runs out.")] = 16384,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per forward pass, at most.")] = 64,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a record. Longer records are cut as in training.")] = 2048,
    only_image: Annotated[
        int | None, typer.Option(min=0, help="Replace only this image of a record, counted from 0. Default: all its images together.")
    ] = None,
    seed: Annotated[int, seed_option("Seed of the null images 'noise' and 'shuffle'.")] = 0,
    measures: Annotated[
        list[str] | None,
        typer.Option(help=f"Save this value of every answer token too, in both passes: {', '.join(MEASURES)}. Can be given several times."),
    ] = None,
    per_encoder: Annotated[
        bool,
        typer.Option("--per-encoder", help="For a mixture: also measure each encoder's VIG, by a pass where it alone sees the null image."),
    ] = False,
    calibrate: Annotated[
        bool, typer.Option(help="Score 1 % of the records with swapped images too (100 to 1,000), and say whether the scorer is fit.")
    ] = True,
    features: Annotated[Path | None, typer.Option(help="Store of `mof encode --model`, read in place of running the encoders.")] = None,
    blurred_features: Annotated[Path | None, typer.Option(help="Store of `mof encode --model --blurred`, with --features.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    *,
    cluster: ClusterOptions,
) -> None:
    """Measure how much the image helped each answer token of each record.

    \b
    Example:
      mof vig score --model runs/mof --records data/train.json --images data/images --output runs/scores
    \b
    On all GPUs of this machine, or of a Ray cluster with its address; the same command resumes it, also with other numbers of GPUs:
      mof vig score --model runs/mof --records data/train.json --images data/images --output runs/scores --ray
    """
    if (features is None) != (blurred_features is None):
        raise ValueError("--features and --blurred-features go together: the score compares the two")
    if not images.is_dir():
        raise ValueError(f"--images {images} is no folder: expected the folder that the records' image paths start from")
    refuse_occupied(output, {"max_length": max_length, "seed": seed}, null)
    processor = load_processor(model, trust_remote_code=trust_remote_code)
    about = {RECORDS_DIGEST: file_digest(records)} if records.is_file() else {}
    raw = read_rows(records)
    network = load_network(model, trust_remote_code=trust_remote_code)
    process = PartialState(cpu=not torch.accelerator.is_available())
    actors = cluster.cluster()
    if actors is None:
        network.to(process.device)
    stored = None
    if features is not None and blurred_features is not None:
        stored = stored_images(network, processor, features), stored_images(network, processor, blurred_features, blurred=True)
    scores = run.score(
        network,
        processor,
        raw,
        output,
        null,
        image_folder=images,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        max_length=max_length,
        only_image=only_image,
        stored_images=stored,
        seed=seed,
        measures=measures or (),
        per_encoder=per_encoder,
        calibrate=calibrate,
        cluster=actors,
        about=about,
    )
    if raw and len(scores.failures) == len(raw):
        raise ValueError(f"none of the {len(raw)} records could be scored; {file_of(output, REJECTED)} says why")
    if process.is_main_process:
        failed = f"{len(scores.failures)} failed" + (f", listed in {file_of(output, REJECTED)}" if scores.failures else "")
        texts = f"{len(scores.manifest['text_only'])} without an image, "
        say(f"{len(scores)} of {len(raw)} records scored in {output}, {texts}{failed}")
        if said := diagnosis(scores.manifest["calibration"]):
            say(said)
        if scores.failures and not len(scores) and not scores.manifest["text_only"]:
            raise typer.Exit(1)
