"""`mof vig image-match`, `attention` and `misleading` measure whether answers depend on the image."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from encoders.command_groups import resumes, starts_over
from encoders.command_options import Images, Limit, Model, Models, Records, TrustRemoteCode, evenly, output_option, seed_option
from encoders.console import Console
from encoders.whole_files import write_json
from mof.data.rows import read_records
from vig.analyses import image_match as matching
from vig.analyses.comparison import attention_table, match_table, misleading_table
from vig.analyses.image_attention import image_attention
from vig.analyses.misleading_text import misleading_text
from vig.nulls import NULL_NAMES
from vig.saved_models import load_model, model_names

Figures = Annotated[Path | None, output_option("JSON file for the figures.")]


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
    output: Figures = None,
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
        groups = matching.with_other_images(read_records(records), seed)
    else:
        files = {"matching": records, "partly matching": partly, "conflicting": conflicting}
        groups = {name: read_records(file) for name, file in files.items()}
    chosen = {name: evenly(group, limit) for name, group in groups.items()}

    def measure() -> None:
        network, processor = load_model(model, trust_remote_code=trust_remote_code)
        rows = matching.image_match(network, processor, chosen, score_dir, null=null, image_folder=images, seed=seed)
        figures = {
            name: {**row.vig._asdict(), "positive": row.positive, "auroc": row.auroc and row.auroc.mean} for name, row in rows.items()
        }
        _show(match_table(rows, model.name), output, {"model": model.name, "null": null, "seed": seed, "groups": figures})

    (starts_over if score_dir is None else resumes)(measure)()


@starts_over
def attention(
    model: Models,
    records: Records,
    images: Images,
    limit: Limit = 200,
    output: Figures = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure the share of attention that goes from the answers to the image, layer by layer; two models are also compared.

    \b
    Example:
      mof vig attention --model runs/full --model runs/vig --records data/test.json --images data/images --output attention.json
    """
    chosen = evenly(read_records(records), limit)
    shares = {}
    for name, folder in model_names(model).items():
        network, processor = load_model(folder, attn_implementation="eager", trust_remote_code=trust_remote_code)
        shares[name] = image_attention(network, processor, chosen, image_folder=images, progress=True)
    _show(attention_table(shares), output, {name: asdict(share) for name, share in shares.items()})


@starts_over
def misleading(
    model: Models,
    questions: Annotated[
        Path, typer.Option(help='JSON list of {"question", "image", "options", "answer"}, optionally "pair" and "false_statement".')
    ],
    images: Images,
    output: Figures = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure the accuracy of greedy answers, with the question alone and with a false statement before it.

    A question without a false_statement gets "The answer is X.", where X is its first wrong option.

    \b
    Example:
      mof vig misleading --model runs/full --model runs/vig --questions data/questions.json --images data/images --output misleading.json
    """
    asked = read_records(questions)
    results = {}
    for name, folder in model_names(model).items():
        network, processor = load_model(folder, trust_remote_code=trust_remote_code)
        results[name] = misleading_text(network, processor, asked, image_folder=images, progress=True)
    figures = {name: {way: asdict(result) for way, result in by_way.items()} for name, by_way in results.items()}
    _show(misleading_table(results), output, figures)


def _show(table: RenderableType, output: Path | None, figures: dict[str, Any]) -> None:
    if output is not None:
        write_json(output, figures)
    Console().print(table)
