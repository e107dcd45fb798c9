"""`mof vig image-match | attention | misleading`: parse arguments, call the analyses, print a table and write JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mof.data.rows import read_records
from vig.analyses.comparison import attention_table, match_table, misleading_table
from vig.analyses.image_attention import image_attention
from vig.analyses.image_match import image_match, with_other_images
from vig.analyses.misleading_text import misleading_text
from vig.nulls import NULL_NAMES
from vig.saved_models import load_model, model_names

Records = Annotated[Path, typer.Option(help="Records in LLaVA's form, .json or .jsonl.")]
Images = Annotated[Path, typer.Option("--image-folder", "--images", help="What the image paths are relative to.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the figures.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only so many, evenly from all over.")]
Models = Annotated[list[Path], typer.Option(help="Folder of any saved image-text-to-text model; may be given again.")]


def image_match_command(
    model: Annotated[Path, typer.Option(help="Folder of any saved image-text-to-text model with its processor.")],
    records: Records,
    image_folder: Images,
    partly: Annotated[Path | None, typer.Option(help="The same records with images that fit in part; with --conflicting.")] = None,
    conflicting: Annotated[Path | None, typer.Option(help="The same records with images that do not fit; with --partly.")] = None,
    null: Annotated[str, typer.Option(help=f"What takes the image's place: {', '.join(NULL_NAMES)}.")] = "blur",
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Of the images drawn.")] = 0,
    score_dir: Annotated[Path | None, typer.Option(help="Keep the scores here; an interrupted run there is resumed.")] = None,
    output: Output = None,
) -> None:
    """Mean VIG of answers with their own image, with one that fits in part, and with a conflicting one.

    The other two images are those of other records: of 50 drawn for each record, the one whose answers share the most words
    with the record's, and the one whose answers share the fewest. Or give records files of your own.

    \b
    Example:
      mof vig image-match --model runs/mof --records data/train.json --images data/images --limit 500 -o match.json
    """
    if (partly is None) != (conflicting is None):
        raise ValueError("--partly and --conflicting go together: each answer is scored with three images")
    if partly is None or conflicting is None:
        groups = {name: _evenly(same, limit) for name, same in with_other_images(read_records(records), seed).items()}
    else:
        files = {"matching": records, "partly matching": partly, "conflicting": conflicting}
        groups = {name: _evenly(read_records(file), limit) for name, file in files.items()}
    network, processor = load_model(model)
    rows = image_match(network, processor, groups, score_dir, null=null, image_folder=image_folder, seed=seed)
    _write(output, {"model": model.name, "null": null, "seed": seed, "groups": {name: _row(row) for name, row in rows.items()}})
    Console().print(match_table(rows, model.name))


def attention_command(model: Models, records: Records, image_folder: Images, limit: Limit = 200, output: Output = None) -> None:
    """Share of attention that goes from the answers to the image, layer by layer; of two models also the difference.

    \b
    Example:
      mof vig attention --model runs/full --model runs/vig --records data/test.json --images data/images -o attention.json
    """
    chosen = _evenly(read_records(records), limit)
    found = {}
    for name, folder in model_names(model).items():
        network, processor = load_model(folder, attn_implementation="eager")
        found[name] = image_attention(network, processor, chosen, image_folder=image_folder, progress=True)
    _write(output, {name: asdict(one) for name, one in found.items()})
    Console().print(attention_table(found))


def misleading_command(
    model: Models,
    questions: Annotated[
        Path, typer.Option(help='JSON list of {"question", "image", "options", "answer"}, also "pair" and "false_statement".')
    ],
    image_folder: Images,
    output: Output = None,
) -> None:
    """Accuracy of greedy answers, with the question alone and with a false statement before it.

    A question without a false_statement of its own gets "The answer is X.", X being its first wrong option.

    \b
    Example:
      mof vig misleading --model runs/full --model runs/vig --questions data/questions.json --images data/images -o misleading.json
    """
    asked = read_records(questions)
    found = {}
    for name, folder in model_names(model).items():
        network, processor = load_model(folder)
        found[name] = misleading_text(network, processor, asked, image_folder=image_folder, progress=True)
    _write(output, {name: {way: asdict(one) for way, one in by_way.items()} for name, by_way in found.items()})
    Console().print(misleading_table(found))


def _evenly(records: Sequence[Any], limit: int | None) -> list[Any]:
    count = len(records) if limit is None else min(limit, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _row(row: Any) -> dict[str, Any]:
    return {**row.vig._asdict(), "positive": row.positive}


def _write(output: Path | None, content: Any) -> None:
    if output is not None:
        output.write_text(json.dumps(content, indent=1) + "\n")
