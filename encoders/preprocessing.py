"""A `Preprocessing` is a value that describes the steps from an image to the square input of an encoder."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from encoders.images.reading import blur
from encoders.images.resizing import Centre, Colour, Fit, Interpolation, to_pixels

# Shapes: S = side of a square image.

GREY: Colour = (127, 127, 127)
NOT_IN_VIEWS = ("crop_pct", "mean", "std")


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing describes the steps before an encoder sees an image: it becomes a square of S x S pixels and is normalised.

    Raises:
        ValueError: for statistics that are not three finite numbers, or a `std` that is not positive.
    """

    image_size: int
    """S, in pixels."""
    fit: Fit = "crop"
    """The way in which the image becomes square, as in `to_pixels`."""
    background: Colour = GREY
    """RGB in 0..255, around padded images."""
    interpolation: Interpolation = field(default="bicubic", kw_only=True)
    """Name of a filter of Pillow."""
    centre: Centre = field(default="round", kw_only=True)
    """Rounding of the crop's place when half a pixel is left over, as in `to_pixels`."""
    crop_pct: float = field(default=1.0, kw_only=True)
    """Share of the resized side that is kept, as in `to_pixels`."""
    mean: tuple[float, ...] = field(default=(0.0, 0.0, 0.0), kw_only=True)
    """Values that are subtracted from pixels in [0, 1], per channel."""
    std: tuple[float, ...] = field(default=(1.0, 1.0, 1.0), kw_only=True)
    """Values by which the pixels are divided afterwards, per channel."""

    def __post_init__(self) -> None:
        for name in ("background", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("mean", "std"):
            given = getattr(self, name)
            if len(given) != 3 or not all(map(math.isfinite, given)) or (name == "std" and min(given) <= 0):
                positive = " (above 0)" if name == "std" else ""
                raise ValueError(f"{name} takes three finite numbers, red, green and blue{positive}; got {list(given)}")

    def pixels(self, image: Image.Image) -> Tensor:
        """Return the RGB image as [3, S, S] uint8, not normalised."""
        options: dict[str, Any] = {"interpolation": self.interpolation, "crop_pct": self.crop_pct, "centre": self.centre}
        return to_pixels(image, self.image_size, self.fit, self.background, **options)  # [3, S, S]

    @property
    def description(self) -> dict[str, Any]:
        """Return the fields for fingerprints (JSON-able), without the size, because it is part of an encoder's spec."""
        names = ("mean", "std", "fit", "interpolation", "crop_pct", "centre")
        colour = {"background": self.background} if self.fit == "pad" and self.background != GREY else {}
        return {name: getattr(self, name) for name in names} | colour


@dataclass(frozen=True)
class View(Preprocessing):
    """A view is the square image that a multimodal model shows to all its encoders. Each encoder normalises it with its own statistics."""

    fit: Fit = "pad"
    blurred: bool = False
    """True if the image is first blurred at its original size (`encoders.images.reading.blur`), which makes VIG's null image."""

    def pixels(self, image: Image.Image) -> Tensor:
        return super().pixels(blur(image) if self.blurred else image)  # [3, S, S]

    @property
    def description(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in NOT_IN_VIEWS}
