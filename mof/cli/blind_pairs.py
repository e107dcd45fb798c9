"""`mof blind-pairs`: a folder of images in, the pairs that CLIP is blind to out, with a page to look at them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from encoders.runs import write_whole
from encoders.store.files import FAILURES
from encoders.weight_files import WeightsError
from mof.cli.annotate import annotate, export
from mof.cli.encode import DTYPES
from mof.pairs.blind_pair_search import BlindPairs, blind_pairs
from mof.pairs.gallery import Gallery
from mof.pairs.image_collection import ImageCollection, encode_collection
from mof.pairs.similarity_sample import SimilaritySample, Thresholds, sample_similarities
from mof.pairs.thumbnail_encoder import SAME_PICTURE

CLIP, DINO = "clip-vit-l14", "dinov2-vit-l14"
"""The paper's encoders."""

pairs_app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
pairs_app.command()(annotate)
pairs_app.command()(export)


@pairs_app.callback(invoke_without_command=True)
def mine(
    context: typer.Context,
    images: Annotated[
        list[str] | None, typer.Option(help="Folder, list (.txt), image or .tar, or a pattern of these: 'train-{000..127}.tar'. Several.")
    ] = None,
    clip: Annotated[list[str] | None, typer.Option(help=f"Encoder that may be blind. Several: to all. Default: {CLIP}.")] = None,
    dino: Annotated[list[str] | None, typer.Option(help=f"Encoder that sees the difference. Several: all. Default: {DINO}.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for pairs.parquet, pairs.csv and gallery.html.")] = None,
    store: Annotated[Path | None, typer.Option(help="Feature store to encode into and read from. Default: features in --out.")] = None,
    clip_above: Annotated[float, typer.Option(help="Keep pairs whose CLIP similarity is above this.")] = 0.95,
    dino_below: Annotated[float, typer.Option(help="And whose DINO similarity is below this.")] = 0.6,
    count: Annotated[bool, typer.Option("--count", help="Only count the pairs.")] = False,
    max_pairs: Annotated[int, typer.Option(min=1, help="Keep so many: those with the largest gap between the two.")] = 5000,
    one_per_image: Annotated[bool, typer.Option("--one-per-image", help="Each image in one pair only, its best.")] = False,
    per_cluster: Annotated[int | None, typer.Option(min=1, help="So many pairs of images that all look alike to CLIP: variety.")] = None,
    keep_copies: Annotated[bool, typer.Option("--keep-copies", help="Count compressed and resized copies of a photo as photos.")] = False,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of both encoders' input, in pixels. Their own by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32,
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Precision of the encoders: {', '.join(DTYPES)}. Theirs by default.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and decode.")] = 2,
    ledger: Annotated[Path | None, typer.Option(help="Folder that notes what is compared: a search that is stopped goes on.")] = None,
) -> None:
    """Find the pairs of images that CLIP takes for the same and DINOv2 does not, and make a page to look at them.

    All images are compared with all, exactly. What is encoded stays in the store: a second run, with other thresholds, say, encodes
    nothing. Copies of a photo, to the byte or compressed and resized, count as one.

    \b
    Example:
      mof blind-pairs --images photos --clip mini-clip --dino mini-dino --clip-above 0.9 -o pairs
    """
    if context.invoked_subcommand is not None:
        return
    if not images or out is None:
        raise ValueError("give --images, and a folder for what is found: -o pairs")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown --dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    clip, dino, store = clip or [CLIP], dino or [DINO], store or out / "features"
    options = {"batch_size": batch_size, "device": device, "dtype": DTYPES[dtype] if dtype else None, "workers": workers}
    try:
        collection = encode_collection(images, clip, dino, store, image_size=image_size, progress=True, **options)
    except WeightsError as error:
        raise WeightsError(f"{error}; to try it without any download: --clip mini-clip --dino mini-dino") from error
    typer.echo(_what_was_read(collection, store))
    pairs = blind_pairs(
        collection.clips,
        collection.dinos,
        clip_above,
        dino_below,
        max_pairs=0 if count else max_pairs,
        one_per_image=one_per_image,
        duplicates_above=None if keep_copies or count else SAME_PICTURE,
        duplicates_by=None if keep_copies or count else collection.thumbnails,
        per_cluster=per_cluster,
        ledger=ledger,
        device=device,
        progress=True,
    )
    typer.echo(pairs.summary())
    sample = sample_similarities(collection.clips, collection.dinos)
    advised = None if pairs.total else sample.advice(clip_above, dino_below)
    for line in _what_to_do(pairs, sample, advised, count):
        typer.echo(line)
    if count:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "pairs.parquet", lambda path: pairs.to_parquet(path, collection.names))
    write_whole(out / "pairs.csv", lambda path: pairs.to_csv(path, collection.names))
    names = (" + ".join(clip), " + ".join(dino))
    told = (collection.duplicates, collection.unreadable)
    gallery = Gallery(pairs, collection.names, *names, clip_above, dino_below, sample, advised, *told)
    page = out / "gallery.html"
    gallery.write(page, images, workers, progress=True)
    typer.echo(f"to look at: {page} ({page.stat().st_size / 1e6:.1f} MB); as tables: pairs.csv, pairs.parquet")


def _what_was_read(collection: ImageCollection, store: Path) -> str:
    told = [f"{len(collection):,} different images"]
    if collection.duplicates:
        told.append(f"{collection.duplicates:,} more files with the content of one of them")
    if collection.unreadable:
        told.append(f"{len(collection.unreadable):,} that could not be read, listed in {store / FAILURES}")
    return ", ".join(told)


def _what_to_do(pairs: BlindPairs, sample: SimilaritySample, advised: Thresholds | None, counted: bool) -> Iterator[str]:
    if pairs.total and not len(pairs) and not counted:
        yield "all of them are compressed or resized copies of one photo; --keep-copies keeps them"
    if not pairs.total and advised is not None:
        yield sample.quantiles()
        yield f"try --clip-above {advised.clip_above} --dino-below {advised.dino_below}: about {advised.pairs:,} pairs"
