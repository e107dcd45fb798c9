"""MoFImageProcessor turns images into a uint8 tensor of squares. Each encoder normalises them for itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from encoders import StoredImage, View
from encoders.images.opening import ADDRESSES, read_address
from encoders.images.reading import read_image
from encoders.images.resizing import Centre, Fit, Interpolation
from mof.auto_map import NamesCode
from mof.config import MoFConfig
from mof.tiles import count_tiles, tiled_pixels

# Shapes: M images in order (with tiles, an image counts once for its thumbnail and once for each tile), S the side of an image,
# H, W = rows and columns of an image as given.


class MoFImagesKwargs(TypedDict, total=False):
    """MoFImagesKwargs names the options of a call for images. transformers finds them among the arguments of a processor by these names."""

    image_size: int
    fit: Fit
    background: Sequence[int]
    max_tiles: int
    return_tensors: str | None


class MoFImageProcessor(NamesCode, BaseImageProcessor):
    """MoFImageProcessor turns images into uint8 pixels of a single size. It does not normalise them, because each encoder does this.

    Args:
        image_size: S, in pixels.
        fit: the way in which an image becomes square: "pad", "crop" or "squash", as in `encoders.preprocessing.Preprocessing`.
        background: RGB in 0..255, around padded images.
        interpolation, centre: the filter, and the rounding of the crop's place, as in `encoders.preprocessing.Preprocessing`.
        max_tiles: the largest number of tiles of an image. An image of more than S x S pixels gives its thumbnail and its tiles
            (`mof.tiles`), each with the tokens of an image. By default there are no tiles.

    Raises:
        ValueError: for `max_tiles` below 1.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    valid_kwargs = MoFImagesKwargs

    def __init__(
        self,
        image_size: int = 336,
        fit: Fit = "pad",
        background: Sequence[int] = (122, 116, 104),
        interpolation: Interpolation = "bicubic",
        centre: Centre = "round",
        max_tiles: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, got {max_tiles}; 1 makes no tiles")
        self.max_tiles = max_tiles
        self.image_size, self.fit, self.background = image_size, fit, list(background)
        self.interpolation, self.centre = interpolation, centre

    @property
    def view(self) -> View:
        """Return the view through which the model sees images. Features in a store must come from the same view."""
        red, green, blue = self.background
        return View(self.image_size, self.fit, (red, green, blue), interpolation=self.interpolation, centre=self.centre)

    def fetch_images(self, images: Any) -> Any:
        """Return RGB images for a single image or nested lists of images, in the same nesting.

        An image is a file, an address, a PIL image, a NumPy array [H, W, 3] or a torch tensor [3, H, W]; arrays and tensors are uint8.

        Raises:
            TypeError: for another object; the message names its type.
            ValueError: for an array or a tensor of another shape or dtype.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, str) and images.startswith(ADDRESSES):
            images = read_image(read_address(images))
        if isinstance(images, (np.ndarray, Tensor)):
            images = _from_array(images)
        if not isinstance(images, (str, os.PathLike, Image.Image)):
            raise TypeError(
                f"an image cannot be a {type(images).__name__}: give a file, an address, a PIL image, a NumPy array [H, W, 3] "
                "or a torch tensor [3, H, W] of uint8"
            )
        return read_image(images)

    def preprocess(
        self,
        images: Any,
        *,
        image_size: int | None = None,
        fit: Fit | None = None,
        background: Sequence[int] | None = None,
        max_tiles: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Return pixel_values [M, 3, S, S] uint8 of a single image or nested lists of images.

        An option that is None has the processor's value. Images from a feature store (`encoders.StoredImage`) give encoder_features
        [M, F] instead. With tiles, `tile_counts` says how many of the M belong to each image.

        Raises:
            ValueError: for a batch of stored and other images, and for tiles of stored images.
        """
        most = self.max_tiles if max_tiles is None else max_tiles
        flat = flatten(images)
        if stored := [image.features for image in flat if isinstance(image, StoredImage)]:
            if len(stored) != len(flat):
                raise ValueError(
                    f"{len(stored)} of {len(flat)} images come out of a feature store; a batch takes all of its images from there, or none"
                )
            if most > 1:
                raise ValueError(
                    f"a feature store holds whole images, without tiles: set max_tiles=1 (now {most}) or encode while training"
                )
            return BatchFeature({"encoder_features": torch.stack(stored)}, tensor_type=return_tensors)  # [M, F]
        flat = self.fetch_images(flat)
        chosen: dict[str, Any] = {"image_size": image_size, "fit": fit, "background": background}
        view = replace(self.view, **{name: value for name, value in chosen.items() if value is not None})
        if most == 1:
            return BatchFeature({"pixel_values": torch.stack([view.pixels(image) for image in flat])}, tensor_type=return_tensors)
        tiles = [tiled_pixels(image, view, most) for image in flat]  # of [K, 3, S, S]
        counts = [len(pixels) for pixels in tiles]
        return BatchFeature({"pixel_values": torch.cat(tiles), "tile_counts": counts}, tensor_type=return_tensors)  # [M, 3, S, S]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Return the number of rows of pixel_values that an image of this size gives. Servers ask for it by this name."""
        options = images_kwargs or {}
        return count_tiles(height, width, options.get("image_size") or self.image_size, options.get("max_tiles") or self.max_tiles)


AutoImageProcessor.register(MoFConfig, image_processor_classes=dict.fromkeys(("torchvision", "pil"), MoFImageProcessor), exist_ok=True)


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    """Return the image of a NumPy array [H, W, 3] or a torch tensor [3, H, W] of uint8."""
    channels, expected = (0, "[3, H, W]") if isinstance(array, Tensor) else (-1, "[H, W, 3]")
    if str(array.dtype).removeprefix("torch.") != "uint8" or array.ndim != 3 or array.shape[channels] != 3:
        raise ValueError(
            f"an image as {type(array).__name__} must be {expected} of uint8, got {list(array.shape)} of {array.dtype}; "
            "scale other numbers to 0..255 and round them first, and give several images as a list"
        )
    pixels = array.permute(1, 2, 0).cpu().numpy() if isinstance(array, Tensor) else array
    return Image.fromarray(np.ascontiguousarray(pixels))


def flatten(images: Any) -> list[Any]:
    """Return a flat list of images, given a single image, a list or nested lists."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [leaf for image in images for leaf in flatten(image)]
