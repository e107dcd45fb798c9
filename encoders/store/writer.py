"""Images are encoded into a feature store: the program reads them and makes items of the new images, `ItemEncoder` encodes the items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from encoders.base import Encoder
from encoders.cluster import Cluster, GivenUp, Parts, grown, worked
from encoders.images.opening import ImageError, ImageLimits
from encoders.images.sources import ImageSources, exists
from encoders.preprocessing import View
from encoders.progress import Advance, progress_bar
from encoders.runs import RunFile, RunLock
from encoders.storage import fetched
from encoders.store.files import FAILURES, TOKEN_FORMATS, VIEW, ImageIndex, TokenFormat, read_view, write_failures, write_view
from encoders.store.items import ItemEncoder
from encoders.store.manifest import FORMAT, MANIFEST, complete, declare, shards_of
from encoders.store.new_images import NewImages
from encoders.store.shards import int8_errors
from encoders.store.view import join_embeddings, prune_store

OWN = (FAILURES, VIEW, "images-*.parquet", "features-*.safetensors", "*.npy")
"""Files of a store, which may have lost its manifest."""
LANES = 2
"""Items that are encoded side by side: one computes while another waits, for a GPU or for cores. Each takes memory."""
INDEXED = 1024
"""The most names that are not in the index on disk yet, or a fraction of all: after a kill, their files are read again."""


@dataclass(frozen=True)
class EncodeReport:
    """EncodeReport holds the numbers of images that a run has seen and encoded."""

    images: int
    """Number of different contents that were seen and can be read and encoded."""
    encoded: int
    """Number of these contents on which an encoder ran; the others were in the store."""
    duplicates: int
    """Number of further names of contents that were seen in this run."""
    unreadable: int
    """Number of names in the store's `failures.jsonl`: unreadable, or with features that are not finite. A cut tar counts once."""
    bytes: int
    """Size of the whole store on disk."""
    int8_error: dict[str, dict[str, float]]
    """For each encoder with int8 tokens, over the whole store: "mean" and "max" of |stored - token| / |token|."""
    gone: int = 0
    """Number of images in the store whose files are gone, or have another content now. `FeatureStore` leaves them out."""

    def summary(self) -> str:
        """Return the numbers as a line of text."""
        parts = [f"{self.images:,} images ({self.encoded:,} encoded now)", f"{self.duplicates:,} duplicates"]
        parts += [f"{self.unreadable:,} unreadable", f"{self.bytes / 2**20:,.1f} MiB on disk"]
        parts += [f"{self.gone:,} whose files are gone, left out (--prune deletes them)"] if self.gone else []
        parts += [f"int8 error of {name} {e['mean']:.2%} (at most {e['max']:.2%})" for name, e in self.int8_error.items()]
        return ", ".join(parts)


def encode_images(
    images: str | Path | Sequence[str | Path],
    encoders: Mapping[str, Encoder],
    out: str | Path,
    *,
    embeddings: bool = True,
    tokens: TokenFormat | None = None,
    view: View | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    workers: int = 2,
    strict: bool = False,
    prune: bool = False,
    progress: bool = True,
    limits: ImageLimits | None = None,
    cluster: Cluster | None = None,
) -> EncodeReport:
    """Write the features of images to a store, which `FeatureStore` reads. A run that was stopped is resumed by the same call.

    An encoder reads and encodes only images (by content) that it has not encoded. So new images and new encoders can be added to
    a store at any time. `FeatureStore` shows the images whose files the last complete run found. Damaged files of the store are
    deleted first, with a warning, and their images are encoded again. This check reads the whole store, unless the environment has
    MOF_CHECK=off.

    Args:
        images: folders, lists, images or tars, as in `encoders.images.sources.ImageSources`.
        encoders: name in the store -> encoder.
        out: the store's folder, which is made if it is missing, or a URL (`encoders.storage`).
        embeddings: store `Encoder.embed_image` in float32, for encoders that have embeddings.
        tokens: store patch tokens in this format; None stores no patch tokens.
        view: the square image that all encoders see. By default each encoder sees the image as its backend prepares it.
        batch_size: images per forward pass.
        device: where to encode; where the encoders are by default, and with a cluster the GPU of each actor.
        dtype: the precision; the encoders' own by default. bfloat16 is several times faster on most machines.
        workers: threads that read and decode images.
        strict: raise an ImageError at the first image that cannot be read or encoded, instead of listing it in `failures.jsonl`.
        prune: afterwards, delete the features of images whose files are gone, of all encoders, and their names.
        progress: show a bar; without a terminal or a notebook, a line a minute.
        limits: the largest files and images that are read; by default the environment's limits (`encoders.images.opening.ImageLimits`).
        cluster: Ray's actors that encode (`encoders.cluster`), in place of this process. All of them see the folder `out`. This process
            reads the images, which need not lie where the actors see them.

    Raises:
        ValueError: for sources without images, impossible options, another encoder under a name that is in the store, a file of
            another store, or a store that another process is writing to.
        ImageError: see `strict`.
    """
    if tokens is not None and tokens not in TOKEN_FORMATS:
        raise ValueError(f"unknown token format {tokens!r}; expected one of {', '.join(TOKEN_FORMATS)}, or None")
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}")
    limits = limits or ImageLimits()
    sources, store = ImageSources(images, limits), fetched(out).absolute()
    RunFile(store / MANIFEST, "feature store", FORMAT, "give a new folder", OWN).refuse_foreign()
    with RunLock(store):
        manifest = declare(store, encoders, view, embeddings=embeddings, tokens=tokens, dtype=dtype, sources=sources.given)
        run = _Run(store, manifest, list(encoders), strict, limits)
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "device": device or ("auto" if cluster else None),
            "dtype": dtype,
            "workers": workers,
        }
        make = partial(ItemEncoder, dict(encoders), manifest, store, view, limits, **options)
        with (
            progress_bar("images", sources.total, progress) as advance,
            closing(run.images.items(sources, batch_size, workers)) as items,
            closing(worked(make, items, cluster, LANES)) as work,
        ):
            try:
                for _, parts in work:
                    run.take(parts, advance)
            finally:  # also when an image's error or the user stops the run
                run.commit()
        return run.finish(sources, prune)


class _Run:
    """A run is a call of `encode_images`."""

    def __init__(self, store: Path, manifest: dict[str, Any], encoders: list[str], strict: bool, limits: ImageLimits) -> None:
        self.store, self.manifest, self.encoders, self.strict = store, manifest, encoders, strict
        self.index = ImageIndex(store, manifest["store"])
        self.images = NewImages(store, manifest, encoders, self.index, limits)
        self.encoded = self.done = self.failed = 0

    def take(self, parts: Parts, advance: Advance) -> None:
        """Enter the outcome of the next item's images. Items come in the order of the sources.

        Raises:
            ImageError: for the first image that failed, with `strict`.
        """
        sizes: dict[str, tuple[int, int]] = {}
        for part, outcome in parts:
            if isinstance(outcome, GivenUp):
                failed = {content.key: outcome.reason for content in part.contents}
            else:
                sizes |= outcome.sizes
                failed = outcome.unreadable | outcome.refused
            self.encoded += sum(bool(content.lacking) and content.key not in failed for content in part.contents)
            self.failed += len(failed)
            for key, reason in failed.items():
                self.images.fail(key, reason)
        images = self.images.waiting.popleft()
        for image in images:
            failure = self.images.reason(image.name)
            self.failed += image.error is not None
            if failure and self.strict:
                raise ImageError(failure)
            if not failure:
                self.index.add(image.name, image.key, image.stat, sizes.get(image.key))
        self.done += len(images)
        advance(self.done, f"{self.failed} unreadable" if self.failed else "")
        if self.index.uncommitted >= grown(self.done, INDEXED, self.done):
            self.commit()

    def commit(self) -> None:
        """Write the index and the list of failures so far."""
        self.index.commit()
        write_failures(self.store, self.images.failures())

    def finish(self, sources: ImageSources, prune: bool) -> EncodeReport:
        fetched(self.store)  # shards that actors on other machines wrote
        failures = self.images.failures()
        good = [key for name, key in self.images.names.items() if name not in failures]
        names = self._view(sources, failures)
        keys = self.index.keys(names)
        if prune:
            prune_store(self.store, self.manifest, names, keys)
            self.manifest["shards"].clear()  # the shards of other encoders have changed too
        write_view(self.store, sorted(names), self.manifest["store"])
        entries = {name: self.manifest["encoders"][name] for name in self.encoders}
        errors = {name: int8_errors(shards_of(self.store, entry)) for name, entry in entries.items() if entry["tokens"] == "int8"}
        complete(self.store, self.manifest, errors)
        if good:
            join_embeddings(self.store, self.manifest, self.encoders)
        size = sum(file.stat().st_size for file in self.store.rglob("*") if file.is_file())
        gone = 0 if prune else len(set().union(*self.images.known.values()) - keys)
        images = len(set(good))
        return EncodeReport(images, self.encoded, len(good) - images, len(failures), size, errors, gone)

    def _view(self, sources: ImageSources, failures: Mapping[str, str]) -> set[str]:
        """Return the names of this run's images that could be read, and of earlier images from other sources that still exist."""
        before = read_view(self.store, self.manifest["store"])
        elsewhere = (self.index.names() if before is None else before & self.index.names()) - self.images.names.keys()
        elsewhere -= set(sources.among(elsewhere))  # not seen, though the run went by
        return self.images.names.keys() - failures.keys() | {name for name in elsewhere if exists(name)}
