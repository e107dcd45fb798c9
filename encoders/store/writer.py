"""encode_images fills a feature store: images are decoded once, in threads, encoded in batches, and written in shards."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from encoders.base import Encoder
from encoders.images.loader import in_order
from encoders.images.opening import ImageError, ImageLimits, read_file
from encoders.images.reading import read_image
from encoders.images.sources import Content, ImageSources, content_key, exists
from encoders.preprocessing import View
from encoders.progress import Advance, progress_bar
from encoders.runs import RunLock, remove_unfinished
from encoders.store.files import TOKEN_FORMATS, ImageIndex, TokenFormat, file_state, read_view, write_failures, write_view
from encoders.store.jobs import LANES, Job
from encoders.store.manifest import complete, declare, run_of
from encoders.store.view import join_embeddings, prune_store

# Shapes: B = images of a batch, S = side of an encoder's input.

SHARD_BYTES, SHARD_IMAGES = 2**28, 65_536
"""A shard is closed when it holds this many bytes or images."""
SECONDS, SHARE = 5.0, 0.02
"""A shard is also closed after this number of seconds or this share of the run's time so far, whichever is longer. A kill loses no more."""


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
) -> EncodeReport:
    """Write the features of images to a store, which `FeatureStore` reads. A run that was stopped is resumed by the same call.

    An encoder reads and encodes only images (by content) that it has not encoded. So new images and new encoders can be added to
    a store at any time. `FeatureStore` shows the images whose files the last complete run found. Damaged files of the store are
    deleted first, with a warning, and their images are encoded again. This check reads the whole store, unless the environment has
    MOF_CHECK=off.

    Args:
        images: folders, lists, images or tars, as in `encoders.images.sources.ImageSources`.
        encoders: name in the store -> encoder.
        out: the store's folder, which is made if it is missing.
        embeddings: store `Encoder.embed_image` in float32, for encoders that have embeddings.
        tokens: store patch tokens in this format; None stores no patch tokens.
        view: the square image that all encoders see. By default each encoder sees the image as its backend prepares it.
        batch_size: images per forward pass.
        device: the device for encoding; by default each encoder's device.
        dtype: the precision; by default each encoder's own. bfloat16 is several times faster on most machines.
        workers: number of threads that read and decode images.
        strict: raise an ImageError at the first image that cannot be read or encoded, instead of listing it in `failures.jsonl`.
        prune: at the end, delete the names of images whose files are gone, and the features of these images by all encoders.
        progress: show a bar, or without a terminal or a notebook a line every minute.
        limits: the largest files and images that are read; by default the environment's limits (`encoders.images.opening.ImageLimits`).

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
    sources, store = ImageSources(images, limits), Path(out)
    store.mkdir(parents=True, exist_ok=True)
    with RunLock(store):
        manifest = declare(store, encoders, view, embeddings=embeddings, tokens=tokens, dtype=dtype)
        remove_unfinished(store)
        options: dict[str, Any] = {"batch_size": batch_size, "device": device, "dtype": dtype}
        with ThreadPoolExecutor(LANES, "encode") as pool, progress_bar("images", sources.total, progress) as advance:
            entries = manifest["encoders"]
            jobs = [Job(name, encoder, entries[name], run_of(manifest, name), store, pool, **options) for name, encoder in encoders.items()]
            run = _Run(store, manifest, jobs, view, strict, limits)
            try:
                run.encode(sources, workers, advance)
            finally:
                pool.shutdown(cancel_futures=True)
        return run.finish(sources, prune)


class _Loaded(NamedTuple):
    """_Loaded holds an image as a thread has prepared it."""

    name: str
    key: str = ""
    stat: tuple[int, int] | None = None
    """Size in bytes and time of a file."""
    size: tuple[int, int] | None = None
    """Width and height; None if the image did not have to be decoded."""
    pixels: dict[str, Tensor] | None = None
    """Encoder -> pixels, for the encoders that lack the image."""
    error: ImageError | None = None


class _Run:
    """_Run is a call of `encode_images`. Only `_load` runs in threads; all other methods run in the main thread."""

    def __init__(
        self, store: Path, manifest: dict[str, Any], jobs: list[Job], view: View | None, strict: bool, limits: ImageLimits
    ) -> None:
        self.store, self.manifest, self.jobs, self.view, self.strict, self.limits = store, manifest, jobs, view, strict, limits
        self.index, self.unreadable = ImageIndex(store, manifest["store"]), dict[str, str]()  # name -> reason
        self.refused = dict[str, str]()  # key -> reason, for images whose features are not finite
        self.names, self.seen = dict[str, str](), set[str]()  # in this run: name -> key; all keys
        self.encoded = self.duplicates = 0
        self.start = self.committed = time.monotonic()

    def encode(self, sources: ImageSources, workers: int, advance: Advance) -> None:
        """Encode every image. If an image's error or the user stops the run, the finished work is kept."""
        ahead = 2 * workers + max(job.batch_size for job in self.jobs)
        try:
            with closing(in_order(self._load, sources, workers, ahead)) as stream:
                for done, loaded in enumerate(stream, 1):
                    self._take(loaded)
                    failed = len(self.unreadable) + len(self.refused)
                    advance(done, f"{failed} unreadable" if failed else "")
            self._collect(wait=True)
        finally:
            self._commit()

    def _load(self, item: tuple[str, Content]) -> _Loaded:
        """Read, hash and decode an image for the encoders that lack it. The image is decoded once for all of them."""
        name, content = item
        try:
            if isinstance(content, ImageError):
                raise content
            stat, key = None, None
            if isinstance(content, Path):
                stat = file_state(_stat(content))
                key = self.index.key_of(name, *stat)
            data = b"" if key is not None and not self._lacking(key) else _bytes(content, self.limits)
            key = key or content_key(data)
            jobs = self._lacking(key)
            if not jobs and self.index.knows(key):
                return _Loaded(name, key, stat)
            image = read_image(data or _bytes(content, self.limits), name, self.limits)
            if self.view is None:
                pixels = {job.name: job.encoder.pixels(image) for job in jobs}  # [3, S, S] each
            else:
                pixels = dict.fromkeys((job.name for job in jobs), self.view.pixels(image))
            return _Loaded(name, key, stat, image.size, pixels)
        except ImageError as error:
            return _Loaded(name, error=error)
        except Exception as error:  # libraries raise errors of any kind, for example for an odd shape; only this image is lost
            return _Loaded(name, error=ImageError(f"{name}: cannot be prepared ({type(error).__name__}: {error})"))

    def _take(self, loaded: _Loaded) -> None:
        """Take in an image. Images are taken in the order of the sources, so a resumed run gives the same store as an unstopped run."""
        if loaded.name in self.names:
            return  # the sources overlap
        self.names[loaded.name] = loaded.key
        if loaded.error is not None:
            if self.strict:
                raise loaded.error
            self.unreadable[loaded.name] = str(loaded.error)
            return
        self.index.add(loaded.name, loaded.key, loaded.stat, loaded.size)
        self.duplicates += loaded.key in self.seen
        self.seen.add(loaded.key)
        jobs = self._lacking(loaded.key)  # fewer encoders if another image with this content was taken since
        self.encoded += bool(jobs)
        for job in jobs:
            job.take(loaded.key, (loaded.pixels or {})[job.name])
        self._collect()

    def _lacking(self, key: str) -> list[Job]:
        return [job for job in self.jobs if key not in job.writer.claimed]

    def _collect(self, wait: bool = False) -> None:
        for job in self.jobs:
            for refused in job.collect(wait):
                self.refused |= refused
                if self.strict and refused:
                    raise ImageError(next(iter(self._failures().values())))
                if self._due():
                    self._commit()

    def _due(self) -> bool:
        writers, now = [job.writer for job in self.jobs], time.monotonic()
        full = any(writer.pending >= SHARD_BYTES or len(writer) >= SHARD_IMAGES for writer in writers)
        return full or now - self.committed > max(SECONDS, SHARE * (now - self.start))

    def _commit(self) -> None:
        """Write the index and then the shards, because the keys of a shard must have names."""
        self.index.commit()
        for job in self.jobs:
            job.writer.commit()
        write_failures(self.store, self._failures())
        self.committed = time.monotonic()

    def _failures(self) -> dict[str, str]:
        """Return name -> reason for the images of this run that failed."""
        names = self.names.items() if self.refused else ()
        return self.unreadable | {name: f"{name}: {self.refused[key]}" for name, key in names if key in self.refused}

    def finish(self, sources: ImageSources, prune: bool) -> EncodeReport:
        names = self._view(sources)
        keys = self.index.keys(names)
        if prune:
            prune_store(self.store, self.manifest, names, keys)
            self.manifest["shards"].clear()  # the shards of other encoders have changed too
        write_view(self.store, sorted(names), self.manifest["store"])
        errors = {job.name: job.writer.errors().summary() for job in self.jobs if job.tokens == "int8"}
        complete(self.store, self.manifest, errors)
        if self.seen - self.refused.keys():
            join_embeddings(self.store, self.manifest, [job.name for job in self.jobs])
        size = sum(file.stat().st_size for file in self.store.rglob("*") if file.is_file())
        gone = 0 if prune else len(set().union(*(job.writer.claimed for job in self.jobs)) - keys - self.refused.keys())
        images, encoded = len(self.seen - self.refused.keys()), self.encoded - len(self.refused)
        return EncodeReport(images, encoded, self.duplicates, len(self._failures()), size, errors, gone)

    def _view(self, sources: ImageSources) -> set[str]:
        """Return the names of the readable images of this run, and of earlier images from other sources that still exist."""
        before = read_view(self.store, self.manifest["store"])
        elsewhere = (self.index.names() if before is None else before & self.index.names()) - self.names.keys()
        elsewhere -= set(sources.among(elsewhere))  # names of this run's sources that the run has not seen are gone
        return self.names.keys() - self._failures().keys() | {name for name in elsewhere if exists(name)}


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened ({error.strerror})") from error


def _bytes(content: Path | bytes, limits: ImageLimits) -> bytes:
    return read_file(content, limits) if isinstance(content, Path) else content
