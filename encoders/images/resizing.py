"""to_pixels makes square uint8 pixel tensors of RGB images, in the ways of open_clip, timm, transformers and LLaVA.

With numba installed (`pip install mof-vig[fast]`), `encoders.images.compiled_resize` does the work. Without it, or with
MOF_PIXELS=pillow in the environment, Pillow does it. The result is the same to the last bit.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from functools import lru_cache
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# Shapes: H, W = rows and columns of an image, S = side of a square model input.

Fit = Literal["pad", "crop", "squash"]
Interpolation = Literal["bicubic", "bilinear", "lanczos"]
Centre = Literal["round", "floor"]
Colour = tuple[int, int, int]  # RGB in 0..255

FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "lanczos")}
LARGEST = 2**27  # pixels between the two passes of a resize

logger = logging.getLogger(__name__)
_IMPORTING = threading.Lock()


class Axis(NamedTuple):
    """An axis says how the width or the height of an image becomes S pixels: it is padded and resized, and S pixels are cut out.

    Attributes:
        length: number of pixels of the image.
        before: number of background pixels before the image.
        padded: number of all pixels, with the background on both sides.
        scaled: number of pixels to which `padded` is resized.
        start: index of the first of the S pixels among the `scaled` pixels.
    """

    length: int
    before: int
    padded: int
    scaled: int
    start: int


def to_pixels(
    image: Image.Image,
    size: int,
    fit: Fit = "pad",
    background: Colour = (127, 127, 127),
    *,
    interpolation: Interpolation = "bicubic",
    crop_pct: float = 1.0,
    centre: Centre = "round",
) -> Tensor:
    """Return the image as the square uint8 tensor [3, S, S] that travels to the device, resized as Pillow does.

    Args:
        image: RGB, as `read_image` returns it.
        size: S, in pixels.
        fit: "pad" centres the whole image on a square of `background` (LLaVA), "crop" keeps the central square (CLIP),
            "squash" ignores the aspect ratio.
        background: RGB in 0..255, for "pad".
        interpolation: the name of a filter of Pillow.
        crop_pct: for "crop" and "squash", as in timm: the image is resized for a square of floor(S / crop_pct), and its
            central S x S pixels are kept. 224 of 256 (DINOv2) is 0.875.
        centre: the rounding of the place of the central pixels when half a pixel is left over: "round" to the even number
            (torchvision, hence open_clip and timm) or "floor" (transformers).

    Raises:
        ValueError: for an unknown `fit`, `interpolation` or `centre`, a size below 1, a `crop_pct` outside (0, 1] or with
            "pad", or an image that is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"to_pixels expects an RGB image, got mode {image.mode!r}; open it with read_image")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if interpolation not in FILTERS:
        raise ValueError(f"unknown interpolation {interpolation!r}; expected one of {', '.join(FILTERS)}")
    if centre not in ("round", "floor"):
        raise ValueError(f"unknown centre {centre!r}; expected 'round' or 'floor'")
    if not 0 < crop_pct <= 1 or (fit == "pad" and crop_pct != 1):
        raise ValueError(f"crop_pct must be above 0 and at most 1, and 1 with fit 'pad', got {crop_pct} with {fit!r}")
    across, down = _axes(image.width, image.height, size, fit, crop_pct, centre)
    compiled = compiled_resize()
    if compiled is None:
        return _by_pillow(image, across, down, size, background, interpolation)
    return _by_compiled(compiled, image, across, down, size, background, interpolation)


def compiled_resize() -> ModuleType | None:
    """Return the module `encoders.images.compiled_resize`, or None without numba. The first import of the module is slow."""
    with _IMPORTING:  # while an import fails in a thread, another thread may be given the module without its names
        return _compiled_resize()


@lru_cache
def _compiled_resize() -> ModuleType | None:
    if os.environ.get("MOF_PIXELS") == "pillow":
        return None
    try:
        import encoders.images.compiled_resize
    except ImportError:
        return None
    except RuntimeError as error:  # numba has no folder that it can write to
        logger.warning("images are resized by Pillow, several times slower: %s", error)
        return None
    return encoders.images.compiled_resize


def _axes(width: int, height: int, size: int, fit: Fit, crop_pct: float, centre: Centre) -> tuple[Axis, Axis]:
    """Return the axis of the width and the axis of the height."""
    if fit == "pad":
        side = max(width, height)
        return Axis(width, (side - width) // 2, side, size, 0), Axis(height, (side - height) // 2, side, size, 0)
    short = math.floor(size / crop_pct)
    if fit == "squash":
        scaled = short, short
    elif fit == "crop":  # the long side cut off to whole pixels, as by torchvision's Resize
        scaled = short * width // min(width, height), short * height // min(width, height)
    else:
        raise ValueError(f"unknown fit {fit!r}; expected 'pad', 'crop' or 'squash'")
    middle = round if centre == "round" else math.floor
    start = middle((scaled[0] - size) / 2), middle((scaled[1] - size) / 2)
    return Axis(width, 0, width, scaled[0], start[0]), Axis(height, 0, height, scaled[1], start[1])


def _columns_first(across: Axis, down: Axis, size: int) -> bool:
    """Return whether the height is resized before the width. The order matters, because each pass rounds and cuts to 0..255.

    The order is Pillow's order for the whole image, except for long strips, for which Pillow would need too much memory.
    """
    if max(across.padded, size) * down.length > LARGEST:
        return True
    return down.padded - down.scaled > max(0, 2 * (across.padded - across.scaled))


def _by_pillow(image: Image.Image, across: Axis, down: Axis, size: int, background: Colour, interpolation: str) -> Tensor:
    def pair(along: int, across: int) -> tuple[int, int]:
        return (along, across) if horizontal else (across, along)

    for horizontal in (False, True) if _columns_first(across, down, size) else (True, False):
        axis, side = (across, image.height) if horizontal else (down, image.width)
        if axis.padded != axis.length:
            canvas = Image.new("RGB", pair(axis.padded, side), background)
            canvas.paste(image, pair(axis.before, 0))
            image = canvas
        # Not resize(box=...), because Pillow takes the corners of the box as float32, and the result is up to two levels off.
        image = image.resize(pair(axis.scaled, side), FILTERS[interpolation])
        image = image.crop((*pair(axis.start, 0), *pair(axis.start + size, side)))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # [S, S, 3] -> [3, S, S]


def _by_compiled(
    compiled: ModuleType, image: Image.Image, across: Axis, down: Axis, size: int, background: Colour, interpolation: str
) -> Tensor:
    code, reach = compiled.FILTERS[interpolation]
    colour = np.array([*background, 0], np.int32)
    x_weights = compiled.weigh(*across, size, code, reach)
    first, taps, *rest = compiled.weigh(*down, size, code, reach)
    top, bottom = int(first.min()), int((first + taps).max())  # a crop needs no other rows
    y_weights = (first - np.int32(top), taps, *rest)
    pixels = _pixels_of(image)[top:bottom]  # [H, W]
    if _columns_first(across, down, size):
        between, out = _room.take((size, image.width), (size, size))  # [S, W], [S, S]
        compiled.resize_columns(pixels, y_weights, colour, between)
        compiled.resize_rows(between, x_weights, colour, out)
    else:
        between, out = _room.take((bottom - top, size), (size, size))  # [H, S], [S, S]
        compiled.resize_rows(pixels, x_weights, colour, between)
        compiled.resize_columns(between, y_weights, colour, out)
    return torch.from_numpy(compiled.planes(out))  # [3, S, S]


class _Room(threading.local):
    """_Room is the working memory of a thread. New memory from the system for every image would cost as much time as resizing."""

    kept = np.empty(0, np.uint32)

    def take(self, *shapes: tuple[int, int]) -> list[NDArray[np.uint32]]:
        sizes = [math.prod(shape) for shape in shapes]
        room = self.kept if sum(sizes) <= self.kept.size else np.empty(sum(sizes), np.uint32)
        if self.kept.size < room.size <= 2**22:  # 16 MB; a giant image gives its memory back
            self.kept = room
        parts = np.split(room[: sum(sizes)], np.cumsum(sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


_room = _Room()


def _pixels_of(image: Image.Image) -> NDArray[np.uint32]:
    """Return the pixels as [H, W], with four bytes per pixel. Pillow's own memory is used if it is a single piece."""
    try:
        return pa.array(image).values.to_numpy().view(np.uint32).reshape(image.height, image.width)  # [4*H*W] -> [H, W]
    except ValueError:  # a large image, whose memory lies in several pieces
        return np.asarray(image.convert("RGBA")).reshape(-1).view(np.uint32).reshape(image.height, image.width)  # [4*H*W] -> [H, W]
