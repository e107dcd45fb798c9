"""The model sees a null image in place of the image when VIG measures how much the image helped.

A null image has the size of the image that it replaces, so both passes of the score have the same tokens. It depends only on that
image (and the seed), so all records with an image share its null image too. There are two exceptions: "drop" leaves the image out of
the conversation, and "attention" hides its tokens from the attention of all other tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from encoders.images.reading import BLUR_KERNELS, ImageError, blur, read_image
from mof.data.records import ImageSource, Record, RecordError

Donors = Sequence[ImageSource]  # the first image of every record that has images
CLIP_MEAN, CLIP_STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
Maker = Callable[[Image.Image, np.random.Generator, Donors], Image.Image]


def _zero(image: Image.Image, rng: np.random.Generator, donors: Donors) -> Image.Image:
    return Image.new("RGB", image.size, (0, 0, 0))


def _mean(image: Image.Image, rng: np.random.Generator, donors: Donors) -> Image.Image:
    red, green, blue = np.asarray(image, dtype=np.float64).mean(axis=(0, 1)).round().astype(int).tolist()
    return Image.new("RGB", image.size, (red, green, blue))


def _noise(image: Image.Image, rng: np.random.Generator, donors: Donors) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, size=(image.height, image.width, 3), dtype=np.uint8))


def _diffusion(image: Image.Image, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Return the image under the noise of VCD (arXiv 2311.16922): step 500 of 1000 of a diffusion, on pixels as CLIP normalises them.

    The noise has a grain of 1/336 of the longer side, so that it is still there after the image is resized to a model's input.
    """
    betas = (0.5e-2 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, 1000))) + 1e-5
    kept = np.prod(1 - betas[:501])  # steps count from 0
    grain = min(1.0, 336 / max(image.size))
    rows, columns = (max(1, round(side * grain)) for side in (image.height, image.width))
    noise = rng.standard_normal((rows, columns, 3))
    down, across = (np.arange(side) * cells // side for side, cells in ((image.height, rows), (image.width, columns)))
    pixels = (np.asarray(image) / 255 - CLIP_MEAN) / CLIP_STD  # [H, W, 3]
    noisy = np.sqrt(kept) * pixels + np.sqrt(1 - kept) * noise[down][:, across]
    return Image.fromarray((255 * (noisy * CLIP_STD + CLIP_MEAN)).round().clip(0, 255).astype(np.uint8))


def _shuffle(image: Image.Image, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Return the image of another record. Many records share an image, so the draw is repeated if the pixels are the same."""
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
    "noise": _noise,  # uniform noise, seeded by the image
    "diffusion": _diffusion,  # the image under strong noise, seeded by the image
    "shuffle": _shuffle,  # another record's image, seeded by the image
}
DROP = "drop"  # no visual tokens: the image's placeholder leaves the conversation
ATTENTION = "attention"  # the image's tokens keep their places, but no token attends to them (CAL, arXiv 2405.17871)
NULL_NAMES = (*NULLS, DROP, ATTENTION)


class NullImages:
    """NullImages makes the null images of records.

    Args:
        null: a name in `NULL_NAMES`, or a function from an RGB image to an RGB image of the same size.
        seed: seed of "noise", "diffusion" and "shuffle", together with the image's pixels, so no score depends on the order of scoring.
        donors: the images from which "shuffle" draws.
        only_image: the index of the single image in each record that is replaced; None replaces all.

    Raises:
        ValueError: for an unknown name, a negative index, or an index with "attention", which hides all images.
    """

    def __init__(
        self,
        null: str | Callable[[Image.Image], Image.Image],
        seed: int,
        donors: Donors = (),
        only_image: int | None = None,
    ) -> None:
        if not callable(null) and null not in NULL_NAMES:
            raise ValueError(f"unknown null image {null!r}; expected one of {', '.join(NULL_NAMES)}, or a function")
        if only_image is not None and only_image < 0:
            raise ValueError(f"only_image is an index from 0 on, or None for all images; got {only_image}")
        if null == ATTENTION and only_image is not None:
            raise ValueError("null='attention' hides all images of a record; leave only_image out")
        self._seed, self._donors, self.only_image = seed, donors, only_image
        self.drops, self.hides = null == DROP, null == ATTENTION
        self._make = _maker(null)
        self.description = _describe(null, donors, only_image)
        """The entry of a run's manifest about its null image."""

    def __call__(self, record_id: str, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Return the images of the record, in order, with null images in place of the images that are to be replaced.

        Raises:
            RecordError: for a record with fewer images than `only_image` asks for.
            ValueError: for a null image of another size than its image.
        """
        nulls = list(images)
        for index in self._replaced(record_id, len(images)):
            key = hashlib.sha256(f"{self._seed}:{pixel_digest(images[index])}".encode()).digest()[:8]
            nulls[index] = self._make(images[index], np.random.default_rng(int.from_bytes(key, "big")), self._donors)
        for image, null in zip(images, nulls, strict=True):
            if null.size != image.size:
                raise ValueError(
                    f"record {record_id!r}: the null image measures {null.size} and the image {image.size}; "
                    "a null function must return an image of the same size"
                )
        return nulls

    def drop_from(self, record: Record) -> Record:
        """Return the record without the images that are to be replaced.

        Raises:
            RecordError: for a record with fewer images than `only_image` asks for.
        """
        gone = self._replaced(record.id, len(record.images))
        places = iter(range(len(record.images)))
        messages = [
            {**message, "content": [part for part in message["content"] if part["type"] != "image" or next(places) not in gone]}
            for message in record.messages
        ]
        return replace(record, messages=messages, images=[image for i, image in enumerate(record.images) if i not in gone])

    def _replaced(self, record_id: str, count: int) -> range:
        if self.only_image is None:
            return range(count)
        if self.only_image >= count:
            raise RecordError(f"record {record_id!r} has {count} image(s), so none of index {self.only_image} to replace")
        return range(self.only_image, self.only_image + 1)


def _maker(null: str | Callable[[Image.Image], Image.Image]) -> Maker:
    if not callable(null):
        return NULLS.get(null, NULLS["same"])
    return lambda image, rng, donors: null(image)


def _describe(null: str | Callable[[Image.Image], Image.Image], donors: Donors, only_image: int | None) -> dict[str, Any]:
    if callable(null):
        null = f"{getattr(null, '__module__', '')}.{getattr(null, '__qualname__', null)}"
    description: dict[str, Any] = {"name": null}
    if null == "blur":
        description["kernel_by_width"] = [list(row) for row in BLUR_KERNELS]
    if null == "shuffle":
        description["donors"] = len(donors)
    if null in ("noise", "diffusion", "shuffle"):
        description["seeded_by"] = "image"
    if only_image is not None:
        description["only_image"] = only_image
    return description


def pixel_digest(image: Image.Image) -> str:
    """Return the digest of an image's size and pixels. Equal images have equal digests."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()
