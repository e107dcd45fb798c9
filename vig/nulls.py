"""Null images: what the model sees in place of the image when VIG asks how much the image helped.

A null image has the size of the image it replaces, so that both branches of the score have the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from encoders.images import BLUR_KERNELS, ImageError, blur, read_image

ImageSource = str | Image.Image  # a file, or an image in memory
Donors = Sequence[ImageSource]  # one image of every record
Maker = Callable[[Image.Image, np.random.Generator, Donors], Image.Image]


def _zero(image: Image.Image, rng: np.random.Generator, donors: Donors) -> Image.Image:
    return Image.new("RGB", image.size, (0, 0, 0))


def _mean(image: Image.Image, rng: np.random.Generator, donors: Donors) -> Image.Image:
    red, green, blue = np.asarray(image, dtype=np.float64).mean(axis=(0, 1)).round().astype(int).tolist()
    return Image.new("RGB", image.size, (red, green, blue))


def _noise(image: Image.Image, rng: np.random.Generator, donors: Donors) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, size=(image.height, image.width, 3), dtype=np.uint8))


def _shuffle(image: Image.Image, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Another record's image. Many records share an image, so one with the same pixels is drawn again."""
    for _ in range(100 if donors else 0):
        try:
            donor = read_image(donors[int(rng.integers(len(donors)))])
        except ImageError:  # the donor's fault, not this record's
            continue
        if donor != image:  # compares size and pixels
            return donor.resize(image.size, Image.Resampling.BICUBIC)
    raise ValueError("null='shuffle' takes another record's image: give records with at least two different images")


NULLS: dict[str, Maker] = {
    "blur": lambda image, rng, donors: blur(image),  # Gaussian blur at the original resolution
    "same": lambda image, rng, donors: image,  # the image itself: VIG is exactly 0, a check of the whole path
    "zero": _zero,  # black
    "mean": _mean,  # the image's mean colour
    "noise": _noise,  # uniform noise, seeded by the record
    "shuffle": _shuffle,  # another record's image, seeded by the record
}


class NullImages:
    """Makes the null images of one record after the other.

    Args:
        null: a name in `NULLS`, or a function from an RGB image to an RGB image of the same size.
        seed: with the record's id it seeds "noise" and "shuffle", so no score depends on the order of scoring.
        donors: where "shuffle" draws from.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, null: str | Callable[[Image.Image], Image.Image], seed: int, donors: Donors = ()) -> None:
        self._seed, self._donors = seed, donors
        self.description: dict[str, Any]  # what the manifest of a run says about its null image
        if callable(null):
            function = null
            self._make: Maker = lambda image, rng, donors: function(image)
            self.description = {"name": f"{getattr(null, '__module__', '')}.{getattr(null, '__qualname__', null)}"}
            return
        if null not in NULLS:
            raise ValueError(f"unknown null image {null!r}; expected one of {', '.join(NULLS)}, or a function")
        self._make = NULLS[null]
        self.description = {"name": null}
        if null == "blur":
            self.description["kernel_by_width"] = [list(row) for row in BLUR_KERNELS]
        if null == "shuffle":
            self.description["donors"] = len(donors)

    def __call__(self, record_id: str, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The null images of the record, in order. ValueError when one has another size than its image."""
        key = hashlib.sha256(f"{self._seed}:{record_id}".encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(key))
        nulls = [self._make(image, rng, self._donors) for image in images]
        for image, null in zip(images, nulls, strict=True):
            if null.size != image.size:
                raise ValueError(
                    f"record {record_id!r}: the null image measures {null.size} and the image {image.size}; "
                    "a null function must return an image of the same size"
                )
        return nulls
