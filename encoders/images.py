"""Image files in, RGB images and uint8 pixel tensors out; the blurred copy that VIG compares with.

Whatever opens an image file in this project goes through `read_image`, so that a rotated photo, a palette GIF and a
16-bit scan mean the same everywhere, and a broken file fails with its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

# Shapes: H, W = rows and columns of an image, S = side of a square model input, N = length of the blurred axis.

Fit = Literal["pad", "crop", "squash"]

# (smallest image width, kernel size k) of the Gaussian null image; sigma = k - 1 (VIG, appendix).
BLUR_KERNELS = ((2000, 501), (800, 301), (500, 201), (0, 101))


class ImageError(ValueError):
    """An image that cannot be read. The message names the file and the reason."""


def read_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """The image as plain 8-bit RGB: EXIF rotation applied, transparency over white, first frame of an animation.

    Args:
        source: a file, or an open PIL image (then of its current frame).

    Raises:
        ImageError: naming the file, for a file that is missing, empty, truncated, no image, or a decompression bomb.
    """
    if isinstance(source, Image.Image):
        return _read(source, f"<{source.mode} image of {source.width}x{source.height}>")
    path = Path(source)
    if not path.is_file():
        raise ImageError(f"{path}: no such image file")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty")
    try:
        with Image.open(path) as image:
            return _read(image, str(path))
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds (SyntaxError, struct.error, ...) for bad bytes
        raise ImageError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error


def _read(image: Image.Image, name: str) -> Image.Image:
    """Decode `image` and convert it to RGB."""
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name}: the image has no pixels")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            return _from_16_bit(image)
        if "transparency" in image.info or image.getbands()[-1] in ("A", "a"):
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except Exception as error:  # the same many kinds: pixels are decoded only here
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey ("I;16", or "I" of some readers) to RGB. Pillow's own conversion clips at 255, this scales."""
    grey = np.asarray(image).astype(np.int64).clip(0, 65535)  # [H, W]
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")


def to_pixels(image: Image.Image, size: int, fit: Fit = "pad", background: tuple[int, int, int] = (127, 127, 127)) -> Tensor:
    """The image as the square uint8 tensor [3, S, S] that travels to the device, resized with Pillow's bicubic filter.

    Args:
        image: RGB, as `read_image` returns it.
        size: S, in pixels.
        fit: "pad" centres the whole image on a square of `background` (LLaVA), "crop" keeps the central square (CLIP),
            "squash" ignores the aspect ratio.
        background: RGB in 0..255, for "pad".

    Raises:
        ValueError: for an unknown `fit`, a size below 1, or an image that is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"to_pixels expects an RGB image, got mode {image.mode!r}; open it with read_image")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if fit == "pad":
        image = _pad(image, size, background)
    elif fit == "crop":
        image = _crop(image, size)
    elif fit == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        raise ValueError(f"unknown fit {fit!r}; expected 'pad', 'crop' or 'squash'")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # [S, S, 3] -> [3, S, S]


def _pad(image: Image.Image, size: int, background: tuple[int, int, int]) -> Image.Image:
    """Centre on a square, then resize; the long side first, because the full square of a long strip takes gigabytes."""
    width, height = image.size
    side = max(width, height)
    if width >= height:
        image = image.resize((size, height), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (size, side), background)
        canvas.paste(image, (0, (side - height) // 2))
    else:
        image = image.resize((width, size), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (side, size), background)
        canvas.paste(image, ((side - width) // 2, 0))
    return canvas.resize((size, size), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, then the centre, as torchvision's Resize and CenterCrop, in one resampling."""
    width, height = image.size
    short = min(width, height)
    scaled_width, scaled_height = size * width // short, size * height // short
    left, top = round((scaled_width - size) / 2), round((scaled_height - size) / 2)
    across, down = width / scaled_width, height / scaled_height  # source pixels per output pixel
    box = (left * across, top * down, min((left + size) * across, width), min((top + size) * down, height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def blur(image: Image.Image) -> Image.Image:
    """The null image of VIG: an RGB image blurred at its original resolution, almost a box blur over k pixels.

    A Gaussian cut off at k pixels with sigma = k - 1, k by image width (`BLUR_KERNELS`), reflected at the borders. An
    axis of n pixels can be reflected by n - 1 at most, so there k is at most 2n - 1; sigma stays.
    """
    kernel = next(k for width, k in BLUR_KERNELS if image.width >= width)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()  # [3, H, W]
    pixels = _blur_last_axis(pixels, kernel)  # [3, H, W]
    pixels = _blur_last_axis(pixels.transpose(1, 2), kernel).transpose(1, 2)  # [3, H, W]
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())  # [H, W, 3]


def _blur_last_axis(pixels: Tensor, kernel: int) -> Tensor:
    """[3, M, N] -> [3, M, N]; by FFT, whose cost does not grow with the hundreds of taps."""
    length = pixels.shape[-1]
    reach = min(kernel // 2, length - 1)
    taps = torch.arange(-reach, reach + 1, dtype=torch.float64)  # [2*reach+1]
    taps = torch.exp(-0.5 * (taps / (kernel - 1)) ** 2)
    taps = (taps / taps.sum()).float()
    padded = F.pad(pixels, (reach, reach), mode="reflect")  # [3, M, N+2*reach]
    size = padded.shape[-1]
    spectrum = torch.fft.rfft(padded) * torch.fft.rfft(taps, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., 2 * reach :]  # [3, M, N]: what no wrap-around has touched
