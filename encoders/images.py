"""Image files in, RGB images and uint8 pixel tensors out; the blurred copy that VIG compares with.

Whatever opens an image file in this project goes through `read_image`, so that a rotated photo, a palette GIF and a
16-bit scan mean the same everywhere, and a broken file fails with its name.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

# Shapes: H, W = rows and columns of an image, S = side of a square model input, N = length of the blurred axis.

Fit = Literal["pad", "crop", "squash"]
Interpolation = Literal["bicubic", "bilinear", "lanczos"]
Centre = Literal["round", "floor"]

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_CANVAS = 2**26  # pixels that may be taken to pad a tall image
PILLOW = int(PIL.__version__.split(".")[0])

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


def to_pixels(
    image: Image.Image,
    size: int,
    fit: Fit = "pad",
    background: tuple[int, int, int] = (127, 127, 127),
    *,
    interpolation: Interpolation = "bicubic",
    crop_pct: float = 1.0,
    centre: Centre = "round",
) -> Tensor:
    """The image as the square uint8 tensor [3, S, S] that travels to the device, resized with Pillow's filters.

    Args:
        image: RGB, as `read_image` returns it.
        size: S, in pixels.
        fit: "pad" centres the whole image on a square of `background` (LLaVA), "crop" keeps the central square (CLIP),
            "squash" ignores the aspect ratio.
        background: RGB in 0..255, for "pad".
        interpolation: Pillow's filter of that name.
        crop_pct: for "crop" and "squash", as in timm: the image is resized for a square of floor(S / crop_pct), and its
            central S x S pixels are kept. 224 of 256 (DINOv2) is 0.875.
        centre: where the central pixels lie when half a pixel is left over: "round" to the even one (torchvision, hence
            open_clip and timm) or "floor" (transformers).

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
    scaled = math.floor(size / crop_pct)
    width, height = image.size
    if fit == "pad":
        image = _pad(image, size, background, FILTERS[interpolation])
    elif fit == "crop":  # the short side to `scaled`, the other cut off as in torchvision's Resize
        short = min(width, height)
        image = _crop(image, (scaled * width // short, scaled * height // short), size, centre, FILTERS[interpolation])
    elif fit == "squash":
        image = _crop(image, (scaled, scaled), size, centre, FILTERS[interpolation])
    else:
        raise ValueError(f"unknown fit {fit!r}; expected 'pad', 'crop' or 'squash'")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # [S, S, 3] -> [3, S, S]


def _pad(image: Image.Image, size: int, background: tuple[int, int, int], resample: Image.Resampling) -> Image.Image:
    """Centre on a square, then resize; the long side first, because the full square of a long strip takes gigabytes."""
    width, height = image.size
    side = max(width, height)
    if width >= height or side**2 <= MAX_CANVAS:  # rows first, as Pillow does: between the passes values are cut to 0..255
        canvas = Image.new("RGB", (side, height), background)
        canvas.paste(image, ((side - width) // 2, 0))
        image = canvas.resize((size, height), resample)
        canvas = Image.new("RGB", (size, side), background)
        canvas.paste(image, (0, (side - height) // 2))
    else:
        image = image.resize((width, size), resample)
        canvas = Image.new("RGB", (side, size), background)
        canvas.paste(image, ((side - width) // 2, 0))
    return canvas.resize((size, size), resample)


def _crop(image: Image.Image, scaled: tuple[int, int], size: int, centre: Centre, resample: Image.Resampling) -> Image.Image:
    """The central `size` x `size` pixels of the image resized to `scaled`, whose other pixels need not exist."""
    (width, height), (scaled_width, scaled_height) = image.size, scaled
    middle = round if centre == "round" else math.floor
    left, top = middle((scaled_width - size) / 2), middle((scaled_height - size) / 2)
    across, down = width / scaled_width, height / scaled_height  # source pixels per output pixel
    columns = (left * across, min((left + size) * across, width))
    rows = (top * down, min((top + size) * down, height))
    # One axis at a time, in the order that Pillow takes for `scaled`: between the passes values are cut to 0..255.
    if PILLOW >= 13 and height - scaled_height > max(0, 2 * (width - scaled_width)):
        image = image.resize((width, size), resample, box=(0, rows[0], width, rows[1]))
        return image.resize((size, size), resample, box=(columns[0], 0, columns[1], size))
    image = image.resize((size, height), resample, box=(columns[0], 0, columns[1], height))
    return image.resize((size, size), resample, box=(0, rows[0], size, rows[1]))


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
