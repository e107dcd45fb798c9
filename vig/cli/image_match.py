"""`mof vig image-match` measures the VIG of answers with images that fit less and less."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from encoders.command_groups import resumes, starts_over
from encoders.command_options import Images, Limit, Model, Records, TrustRemoteCode, evenly, output_option, seed_option
from encoders.console import Console
from encoders.runs import write_json
from mof.data.rows import read_records
from vig.analyses import image_match as analysis
from vig.analyses.comparison import match_table
from vig.nulls import NULL_NAMES
from vig.saved_models import load_model


def image_match(
    model: Model,
    records: Records,
    images: Images,
    partly: Annotated[Path | None, typer.Option(help="The same records with images that fit in part; with --conflicting.")] = None,
    conflicting: Annotated[Path | None, typer.Option(help="The same records with images that do not fit; with --partly.")] = None,
    null: Annotated[str, typer.Option(help=f"The image that replaces each image: {', '.join(NULL_NAMES)}.")] = "blur",
    limit: Limit = None,
    seed: Annotated[int, seed_option("Seed of the drawn images.")] = 0,
    score_dir: Annotated[Path | None, typer.Option(help="Folder that keeps the scores. A run that was stopped there is resumed.")] = None,
    output: Annotated[Path | None, output_option("JSON file for the figures.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare the mean VIG of answers with their own image, with an image that fits in part, and with a conflicting image.

    For each record, 50 other records are drawn. The record whose answers share the most words with its answers gives the image that
    fits in part, and the record whose answers share the fewest words gives the conflicting image. Or give --partly and --conflicting.

    \b
    Example:
      mof vig image-match --model runs/mof --records data/train.json --images data/images --limit 500 --output match.json
    """
    if (partly is None) != (conflicting is None):
        raise ValueError("--partly and --conflicting go together: each answer is scored with three images")
    if partly is None or conflicting is None:
        groups = analysis.with_other_images(read_records(records), seed)
    else:
        files = {"matching": records, "partly matching": partly, "conflicting": conflicting}
        groups = {name: read_records(file) for name, file in files.items()}
    chosen = {name: evenly(group, limit) for name, group in groups.items()}

    def measure() -> None:
        network, processor = load_model(model, trust_remote_code=trust_remote_code)
        rows = analysis.image_match(network, processor, chosen, score_dir, null=null, image_folder=images, seed=seed)
        if output is not None:
            figures = {name: {**row.vig._asdict(), "positive": row.positive} for name, row in rows.items()}
            write_json(output, {"model": model.name, "null": null, "seed": seed, "groups": figures})
        Console().print(match_table(rows, model.name))

    (starts_over if score_dir is None else resumes)(measure)()
