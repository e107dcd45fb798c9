"""Image files are read as RGB images, and blurred for the comparison that VIG makes.

All code of this project opens image files with `read_image`. So a rotated photo, a palette GIF and a 16-bit scan are read in the
same way everywhere, and the error for a broken file names the file.
"""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.nn import functional as F

# Shapes: H, W = rows and columns of an image, N = length of the blurred axis.

# (smallest image width, kernel size k) of the Gaussian null image; sigma = k - 1 (VIG, appendix).
BLUR_KERNELS = ((2000, 501), (800, 301), (500, 201), (0, 101))

TURNS = {  # EXIF orientation -> the turn that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be read. The message names the file and the reason."""


def read_image(source: str | os.PathLike[str] | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Return the image as plain 8-bit RGB: EXIF rotation applied, transparency over white, first frame of an animation.

    Args:
        source: a file, the content of a file, or an open PIL image (its current frame is read; RGB in memory is returned as it is).
        name: the name of the image in errors; by default the file's path.

    Raises:
        ImageError: naming the file, if it is missing, empty, truncated, no image, or a decompression bomb.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, name or f"<{source.mode} image of {source.width}x{source.height}>")
    if isinstance(source, bytes):
        name, content = name or f"<image of {len(source)} bytes>", source
    else:
        name, content = name or os.fspath(source), _read_file(Path(source))
    if not content:
        raise ImageError(f"{name}: the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _to_rgb(_decode_jpeg(image, content) or image, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name}: cannot be read as an image (starts with {content[:12]!r})") from None
    except Exception as error:  # Pillow's readers raise many kinds (SyntaxError, struct.error, ...) for bad bytes
        raise ImageError(f"{name}: cannot be read as an image ({type(error).__name__}: {error})") from error


def pixels_of(image: Image.Image) -> tuple[str, tuple[int, int], bytes]:
    """Return mode, size and pixels of an open image, as `read_image` shows it: palette, transparency and orientation count.

    Two images with equal values are the same image for every encoder. An image that cannot be decoded has no pixels here.
    """
    try:
        seen = read_image(image)
        return seen.mode, seen.size, seen.tobytes()
    except ImageError:  # the reader of its pixels reports it
        return image.mode, image.size, b""


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path}: no such image file") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a name that is too long or has a zero byte
        raise ImageError(f"{path}: cannot be read ({error})") from error


def _decode_jpeg(image: Image.Image, content: bytes) -> Image.Image | None:
    """Decode a healthy JPEG with simplejpeg (`pip install mof-vig[fast]`): the same pixels in less time. Return None if Pillow has
    to do it.

    The strict mode refuses every file that libjpeg warns of, so that Pillow alone decides what is broken.
    """
    decoder = _simplejpeg()
    if decoder is None or image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    try:
        pixels = decoder.decode_jpeg(content, "RGBA", strict=True)  # [H, W, 4]
    except ValueError:
        return None
    if pixels.shape[:2] != (image.height, image.width):
        return None
    flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 4)  # [H*W] of 4 bytes, as Pillow keeps them
    decoded = Image.fromarrow(flat, "RGB", image.size)  # takes the memory over
    decoded.info = image.info
    return decoded


@lru_cache
def _simplejpeg() -> ModuleType | None:
    if os.environ.get("MOF_PIXELS") == "pillow":
        return None
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode `image` if necessary, convert it to RGB and turn it upright."""
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name}: the image has no pixels")
    try:
        image.load()
        turn = TURNS.get(_orientation(image))
        if image.mode.startswith("I"):
            image = _from_16_bit(image)
        elif "transparency" in image.info or image.getbands()[-1] in ("A", "a"):
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert("RGB")
        elif image.mode != "RGB" or isinstance(image, ImageFile):
            image = image.convert("RGB")
        if turn is not None:
            image = image.transpose(turn)
            image.info = {}  # it says that the image lies on its side
        return image
    except Exception as error:  # Pillow's readers raise many kinds, and pixels are decoded only here
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata; the pixels may well be sound
        return 1


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey ("I;16", or "I" from a few readers) to RGB. Pillow's own conversion clips at 255 instead of scaling."""
    grey = np.asarray(image).astype(np.int64).clip(0, 65535)  # [H, W]
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")


def blur(image: Image.Image) -> Image.Image:
    """Return VIG's null image: the RGB image, blurred at its original resolution.

    The filter is a Gaussian with sigma = k - 1, cut off at k pixels, so it is almost a box of k pixels. k depends on the width of
    the image (`BLUR_KERNELS`). Borders are reflected. An axis of n pixels can be reflected by at most n - 1 pixels, so k is at
    most 2n - 1 there; sigma stays.
    """
    kernel = next(k for width, k in BLUR_KERNELS if image.width >= width)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()  # [3, H, W]
    pixels = _blur_last_axis(pixels, kernel)  # [3, H, W]
    pixels = _blur_last_axis(pixels.transpose(1, 2), kernel).transpose(1, 2)  # [3, H, W]
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())  # [H, W, 3]


def _blur_last_axis(pixels: Tensor, kernel: int) -> Tensor:
    """[3, M, N] -> [3, M, N]. The cost of an FFT does not grow with the hundreds of taps."""
    length = pixels.shape[-1]
    reach = min(kernel // 2, length - 1)
    taps = torch.arange(-reach, reach + 1, dtype=torch.float64)  # [2*reach+1]
    taps = torch.exp(-0.5 * (taps / (kernel - 1)) ** 2)
    taps = (taps / taps.sum()).float()
    padded = F.pad(pixels, (reach, reach), mode="reflect")  # [3, M, N+2*reach]
    size = padded.shape[-1]
    spectrum = torch.fft.rfft(padded) * torch.fft.rfft(taps, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., 2 * reach :]  # [3, M, N]: the part without wrap-around
