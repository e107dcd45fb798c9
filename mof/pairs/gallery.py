"""A page to look at pairs with: one HTML file that holds everything, thumbnails too."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from encoders.images.loader import ImageLoader
from encoders.images.sources import ImageSources
from encoders.runs import write_whole
from mof.pairs.blind_pair_search import BlindPairs
from mof.pairs.choice import in_order
from mof.pairs.similarity_sample import SimilaritySample, Thresholds

# Shapes: M pairs, L images that are in them.

SHOWN = 5000
"""Pairs at most: a page of some tens of megabytes. The tables hold all."""
SIDES = ((400, 384), (1500, 224), (4000, 160))
"""(L, longest side of their thumbnails in pixels): the more there are, the smaller, so that the page stays below some 40 MB."""
SMALLEST_SIDE = 128
QUALITY, TINY = 70, 100
"""Of the JPEG files; images of a lesser side are shown by their pixels, and kept better."""
BLOCK = 100
"""Thumbnails in one piece of the page, which is read when the first of them is looked at."""
BARS = 64


@dataclass(frozen=True)
class Gallery:
    """What the page tells."""

    pairs: BlindPairs
    names: Sequence[str]
    """[N] of all images that were compared"""
    clip: str
    """What the first encoder, or encoders, are called."""
    dino: str
    clip_above: float
    dino_below: float
    sample: SimilaritySample
    advice: Thresholds | None
    """Where nothing was found."""
    duplicates: int
    unreadable: Mapping[str, str]
    """name -> reason"""

    def write(self, path: str | Path, images: str | Path | Sequence[str | Path], workers: int = 2, progress: bool = False) -> None:
        """Write the page; the thumbnails are made from `images`, given as they were to be encoded."""
        shown = in_order(np.empty(0, np.int64), self.pairs.i[:SHOWN], self.pairs.j[:SHOWN]).tolist()  # [L], best pairs first
        names = [self.names[image] for image in shown]
        side = next((side for most, side in SIDES if len(names) <= most), SMALLEST_SIDE)
        thumbnails = make_thumbnails(images, names, side, workers, progress)
        encoded = [base64.b64encode(thumbnails.get(name, b"")).decode() for name in names]
        page = _TEMPLATES.get_template("gallery.html").stream(
            gallery=self,
            rows=list(self._rows({image: place for place, image in enumerate(shown)})),
            images=[[name, os.path.exists(name)] for name in names],
            blocks=[encoded[start : start + BLOCK] for start in range(0, len(encoded), BLOCK)],
            block_size=BLOCK,
            charts=[
                Chart(self.clip, "above", self.clip_above, self.sample.clip),
                Chart(self.dino, "below", self.dino_below, self.sample.dino),
            ],
        )
        write_whole(Path(path), lambda temporary: page.dump(str(temporary), encoding="utf-8"))

    def _rows(self, places: Mapping[int, int]) -> Iterator[tuple[int, int, float, float]]:
        """Of each shown pair: places of its images, similarities."""
        pairs = self.pairs
        columns = (pairs.i[:SHOWN], pairs.j[:SHOWN], pairs.clip_similarity[:SHOWN], pairs.dino_similarity[:SHOWN])
        for i, j, clip, dino in zip(*(column.tolist() for column in columns), strict=True):
            yield places[i], places[j], round(clip, 4), round(dino, 4)


@dataclass(frozen=True)
class Chart:
    """A histogram of one similarity, with the cut."""

    name: str
    side: str
    """Of the cut that is kept: "above" or "below"."""
    cut: float
    values: NDArray[np.float32]
    """[M]"""

    @property
    def share(self) -> float:
        """Of the pairs, on the kept side."""
        kept = self.values > self.cut if self.side == "above" else self.values < self.cut
        return float(kept.mean()) if len(kept) else 0.0

    @property
    def axis(self) -> tuple[float, float]:
        """From where to where, in tenths."""
        low, high = self.values.min(initial=self.cut), self.values.max(initial=self.cut)
        return math.floor(10 * low) / 10, math.ceil(10 * high + 1e-6) / 10

    @property
    def ticks(self) -> list[float]:
        low, high = (round(10 * end) for end in self.axis)
        step = 1 if high - low < 8 else 2
        return [tick / 10 for tick in range(-(-low // step) * step, high + 1, step)]

    def at(self, value: float) -> float:
        """Where on the axis, from 0 to 1."""
        low, high = self.axis
        return float((value - low) / (high - low))

    @property
    def bars(self) -> list[tuple[float, float, bool]]:
        """Left end from 0 to 1, height from 0 to 1 by the logarithm of the count, and whether on the kept side."""
        counts, edges = np.histogram(self.values, BARS, self.axis)
        heights = np.log1p(counts) / np.log1p(max(counts.max(), 1))
        middles = (edges[1:] + edges[:-1]) / 2
        kept = middles > self.cut if self.side == "above" else middles < self.cut
        return [(self.at(left), float(height), bool(inside)) for left, height, inside in zip(edges, heights, kept, strict=False)]


def make_thumbnails(
    images: str | Path | Sequence[str | Path], names: Iterable[str], side: int, workers: int = 2, progress: bool = False
) -> dict[str, bytes]:
    """JPEG files by name, of those `names` among the images that can be read; tars are gone through once."""
    wanted = set(names)

    def contents() -> Iterator[tuple[str, bytes]]:
        for name, content in ImageSources(images):
            if name in wanted and isinstance(content, Path):
                content = content.read_bytes() if content.is_file() else b""
            if name in wanted and isinstance(content, bytes):
                yield name, content

    loader = ImageLoader(contents(), workers, transform=lambda image: thumbnail(image, side))
    with Progress(disable=not (progress and wanted)) as bar:
        return dict(bar.track(loader, total=len(wanted), description="thumbnails"))


def thumbnail(image: Image.Image, side: int) -> bytes:
    """As a JPEG file, its longest side at most `side`."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((side, side), reducing_gap=2.0)
    tiny = max(small.size) < TINY
    small.save(file, "JPEG", quality=95 if tiny else QUALITY, subsampling=0 if tiny else 2, optimize=True)
    return file.getvalue()


_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)

__all__ = ["Chart", "Gallery", "make_thumbnails", "thumbnail"]
