"""The gallery is a page that shows pairs: an HTML file that holds everything, thumbnails too."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from encoders.images.loader import ImageLoader
from encoders.images.opening import ImageError, ImageLimits
from encoders.images.sources import ImageSources
from encoders.pages import write_page
from encoders.pages.charts import column_edges, histogram, to_svg
from encoders.pages.thumbnails import thumbnail
from encoders.progress import tracked
from encoders.storage import url_of
from mof.evals.patterns import PATTERNS
from mof.pairs.choice import in_order
from mof.pairs.pair_table import BlindPairs
from mof.pairs.similarity_sample import SimilaritySample, Thresholds

# Shapes: M = pairs, L = images that are in the shown pairs.

SHOWN = 5000
"""Number of pairs in the page at most, which then has tens of megabytes. The tables hold all pairs."""
SIDES = ((400, 384), (1500, 224), (4000, 160))
"""(L at most, longest side of the thumbnails in pixels): more images get smaller thumbnails, so that the page stays below 40 MB."""
SMALLEST_SIDE = 128
BLOCK = 100
"""Number of thumbnails in a block of the page, which is parsed when the page shows its first thumbnail."""


@dataclass(frozen=True)
class Gallery:
    """Gallery holds the contents of the page."""

    pairs: BlindPairs
    names: Sequence[str]
    """[N] names of all images that were compared"""
    clip: str
    """Name of the first encoder, or encoders."""
    dino: str
    """Name of the second encoder, or encoders."""
    clip_above: float
    dino_below: float
    sample: SimilaritySample
    advice: Thresholds | None
    """Thresholds to try where nothing was found."""
    duplicates: int
    unreadable: Mapping[str, str]
    """name -> reason"""
    note: str = ""
    """A warning about the encoders, shown above the pairs."""

    def write(
        self,
        path: str | Path,
        images: str | Path | Sequence[str | Path],
        workers: int = 2,
        progress: bool = False,
        limits: ImageLimits | None = None,
    ) -> None:
        """Write the page; the thumbnails are made from `images`, the same sources that were encoded."""
        shown = in_order(np.empty(0, np.int64), self.pairs.i[:SHOWN], self.pairs.j[:SHOWN]).tolist()  # [L], best pairs first
        names = [self.names[image] for image in shown]
        side = next((side for most, side in SIDES if len(names) <= most), SMALLEST_SIDE)
        thumbnails = make_thumbnails(images, names, side, workers, progress, limits)
        encoded = [base64.b64encode(thumbnails.get(name, b"")).decode() for name in names]
        clip, dino = self.sample.clip, self.sample.dino
        write_page(
            Path(path),
            Path(__file__).with_name("gallery.html"),
            gallery=self,
            rows=list(self._rows({image: place for place, image in enumerate(shown)})),
            images=[[name, address(name, Path(path).parent) or False] for name in names],
            patterns=list(PATTERNS),
            blocks=[encoded[start : start + BLOCK] for start in range(0, len(encoded), BLOCK)],
            block_size=BLOCK,
            clip_chart=similarity_chart(clip, self.clip_above, "above", self.clip, "orange"),
            dino_chart=similarity_chart(dino, self.dino_below, "below", self.dino, "teal"),
            clip_share=share_text(clip > self.clip_above),
            dino_share=share_text(dino < self.dino_below),
        )

    def _rows(self, places: Mapping[int, int]) -> Iterator[tuple[int, int, float, float]]:
        """Yield the places of the images and the similarities of each shown pair."""
        pairs = self.pairs
        columns = (pairs.i[:SHOWN], pairs.j[:SHOWN], pairs.clip_similarity[:SHOWN], pairs.dino_similarity[:SHOWN])
        for i, j, clip, dino in zip(*(column.tolist() for column in columns), strict=True):
            yield places[i], places[j], round(clip, 4), round(dino, 4)


def address(name: str, folder: Path) -> str | None:
    """Return the address of an image file for a page in the folder, which holds where the folders are served, too; None for no file.

    A page on other storage has no way to files on a disk.
    """
    return quote(os.path.relpath(name, folder)) if os.path.isfile(name) and url_of(folder) is None else None


def share_text(chosen: NDArray[np.bool_]) -> str:
    """Return the share of chosen values [M] in %. "0" means none and "100" means all."""
    percent = 100 * float(chosen.mean()) if len(chosen) else 0.0
    if percent in (0, 100):
        return f"{percent:.0f}"
    if percent < 1:
        return f"{percent:.2g}" if percent >= 1e-4 else "less than 0.0001"
    return f"{percent:.1f}" if percent < 99.95 else "more than 99.9"


def similarity_chart(values: NDArray[np.float32], cut: float, kept: str, name: str, colour: str) -> Markup:
    """Return a histogram of the similarities [M] of one encoder, with the cut and the side that is kept, "above" or "below"."""
    low, high = values.min(initial=cut), values.max(initial=cut)
    drawn = histogram(
        values, np.unique(column_edges(float(low), float(high), cut).clip(-1, 1)), label=f"similarity by {name}", unit="pairs",
        cut=cut, kept=kept, note=f"kept: {kept} {cut}", colour=colour, log=True, height=200,
    )  # fmt: skip
    return to_svg(drawn, f"Histogram of the similarities by {name}, with the cut at {cut}")


def make_thumbnails(
    images: str | Path | Sequence[str | Path],
    names: Iterable[str],
    side: int,
    workers: int = 2,
    progress: bool = False,
    limits: ImageLimits | None = None,
) -> dict[str, bytes]:
    """Return name -> JPEG file, for those of the `names` whose images can be read. Tar files are read once."""
    wanted = set(names)
    contents = ((name, content) for name, content in ImageSources(images, limits) if name in wanted and not isinstance(content, ImageError))
    loader = ImageLoader(contents, workers, transform=lambda image: thumbnail(image, side), limits=limits)
    return dict(tracked(loader, "thumbnails", len(wanted), progress and bool(wanted)))
