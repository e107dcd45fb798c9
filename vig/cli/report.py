"""`mof vig report` writes a page about the scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from encoders.command_groups import starts_over
from encoders.command_options import DecodingName, Records, images_option, output_option
from encoders.terminal import say
from mof.data.rows import RawRecord, rows_by_id, stream_rows
from vig.report.page import shown_ids, write_report
from vig.scoring.scores import Scores, load_scores
from vig.selection.sources import record_sources
from vig.selection.thresholds import select

if TYPE_CHECKING:
    from vig.report.explanation import Explanation


@starts_over
def report(
    scores: Annotated[
        list[Path],
        typer.Argument(help="Folders of `mof vig score`: the first is shown, folders with other null images are compared with it."),
    ],
    records: Records,
    output: Annotated[Path, output_option("HTML file to write.")],
    images: Annotated[Path | None, images_option("Folder of the records' images. Default: no images are shown.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the samples to keep, in [0, 1]. It sets the threshold that is drawn.")] = 0.7,
    floor: Annotated[bool, typer.Option("--floor", help="Draw the threshold of `mof vig select --floor`, in place of --keep.")] = False,
    source_key: Annotated[
        str | None, typer.Option(help="Key of a record that names its source; 'image' takes the top folder of its image.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of records shown from either end.")] = 25,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a saved model, whose own answers to three records of either end are explained.")
    ] = None,
    decoding: DecodingName = None,
) -> None:
    """Show the scores on one page: distribution, words, samples with coloured tokens, null images and sparsity.

    \b
    Example:
      mof vig report runs/scores --records data/train.json --images data/images --output report.html
      mof vig report runs/scores --records data/train.json --images data/images --model runs/mof --decoding vcd --output report.html
    """
    runs = [_load(folder) for folder in scores]
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images} is no folder; leave --images out for a page without images")
    if decoding is not None and model is None:
        raise ValueError("--decoding is for answers of a model: give --model too")
    rows: Iterable[Any] = stream_rows(records)
    sources = None
    if source_key is not None:  # the records are read once, and few of them are kept
        wanted, kept = shown_ids(runs[0], samples), list[Any]()
        sources, rows = record_sources(_keeping(rows, wanted, kept), source_key), kept
    selection = select(runs[0], keep, floor=floor, sources=sources)
    write_report(
        output,
        selection,
        rows,
        image_folder=images,
        others=runs[1:],
        samples=samples,
        explain=None if model is None else _explainer(model, images, decoding),
        records_name=str(records),
        progress=True,
    )
    say(f"{output}: {len(runs[0])} records; {selection.summary()}")


def _keeping(records: Iterable[Any], wanted: Collection[str], kept: list[Any]) -> Iterator[Any]:
    """Yield the records, and put the records with the wanted ids into `kept`."""
    for id, row in rows_by_id(records):
        if id in wanted:
            kept.append(row)
        yield row


def _explainer(model: Path, images: Path | None, decoding: str | None) -> Callable[[RawRecord], Explanation]:
    from vig.decoding import build_decoding
    from vig.report.explanation import explain, first_question
    from vig.saved_models import load_model  # slow, because it needs torch; reports without answers do not need it

    method = None if decoding is None else build_decoding(decoding)
    network, processor = load_model(model)
    return lambda raw: explain(network, processor, first_question(raw, images), method)


def _load(folder: Path) -> Scores:
    scores = load_scores(folder)
    if not len(scores):
        text_only, failures = scores.manifest["text_only"], scores.failures
        first = next(iter(failures.values()), None)
        raise ValueError(
            f"{folder} holds no scores to show: {len(text_only)} text-only records, {len(failures)} that could not be scored"
            + (f", the first because: {first}" if first else "")
        )
    return scores
