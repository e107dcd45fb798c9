"""read_image reads image files as RGB images, and blur makes the null images of VIG.

All code of this project reads images with `read_image`. So a rotated photo, a palette GIF and a 16-bit scan are read in the same way
everywhere, and the error for a broken file names the file. `encoders.images.opening` decides which files are opened.
"""

from __future__ import annotations

import os
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile

from encoders.images.opening import ImageError, ImageLimits, check_opened, open_image, read_file, reason

if TYPE_CHECKING:
    from torch import Tensor  # imported late, because code that only reads images or digests records does not need it

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

WHITES = (255, 65535, 2**31 - 1)
"""Possible values of white in grey images of more than 8 bits. The smallest that no pixel exceeds is white. Floats may also have 1."""
NOISE, OVERSHOOT = 0.1, 0.25
"""Shares of white: an integer may be below 0 by the first, a float below 0 or above white by the second, because resizing overshoots."""


def read_image(
    source: str | os.PathLike[str] | bytes | Image.Image, name: str | None = None, limits: ImageLimits | None = None
) -> Image.Image:
    """Return the image as plain 8-bit RGB: EXIF rotation is applied, transparent pixels become white, and animations give the first frame.

    Grey images of floats or of 32-bit integers do not name the value of white. It is taken to be the smallest of 1 (floats only), 255,
    65535 and 2^31 - 1 that no pixel exceeds; floats may exceed it by a quarter, as after bicubic resizing. NaN pixels are missing and
    become white, like transparent pixels.

    Args:
        source: a file, the content of a file, or an open PIL image (its current frame is read; RGB in memory is returned as it is).
            An image that was made from an opened image, for example by rotation, counts as upright, whatever EXIF it has.
        name: the name of the image in errors; by default the file's path.
        limits: the largest file and image that are read; by default the limits of the environment (`ImageLimits`).

    Raises:
        ImageError: for a file that is missing, empty, truncated, not regular, too large, or no image of a known format; the message
            names the file.
    """
    if isinstance(source, Image.Image):
        name = name or f"<{source.mode} image of {source.width}x{source.height}>"
        check_opened(source, name, limits)
        return _to_rgb(source, name)
    if isinstance(source, bytes):
        name, content = name or f"<image of {len(source)} bytes>", source
    else:
        name, content = name or os.fspath(source), read_file(source, limits)
    with open_image(content, name, limits) as image:
        return _to_rgb(image, name, content)


def pixels_of(image: Image.Image) -> tuple[str, tuple[int, int], bytes]:
    """Return mode, size and pixels of an open image as `read_image` returns it, with palette, transparency and orientation applied.

    Two images with equal values are the same image for every encoder. For an image that cannot be decoded, the pixels are empty.
    """
    try:
        seen = read_image(image)
        return seen.mode, seen.size, seen.tobytes()
    except ImageError:  # the error is reported when the image is read for an encoder
        return image.mode, image.size, b""


def _decode_jpeg(image: Image.Image, content: bytes) -> Image.Image | None:
    """Decode an undamaged JPEG with simplejpeg (`pip install mof-vig[fast]`), which gives Pillow's pixels in less time.

    Return None if Pillow has to decode the image. The strict mode refuses every file for which libjpeg warns, so that Pillow alone
    decides which files are broken.
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
    return Image.fromarrow(flat, "RGB", image.size)  # without a copy


@lru_cache
def _simplejpeg() -> ModuleType | None:
    if os.environ.get("MOF_PIXELS") == "pillow":
        return None
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _to_rgb(image: Image.Image, name: str, content: bytes = b"") -> Image.Image:
    """Decode an image, convert it to RGB and turn it upright. `content` is the content of its file, if it comes from a file."""
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name}: the image has no pixels")
    try:
        decoded = _decode_jpeg(image, content) if content else None
        if decoded is None:
            image.load()
        # Images that were made from an opened image keep its EXIF, although they may have been turned.
        turn = TURNS.get(_orientation(image)) if isinstance(image, ImageFile) else None
        rgb = decoded or _convert(image, name)
        if turn is not None:
            rgb = rgb.transpose(turn)
            rgb.info = {}  # its EXIF says that the image still has to be turned
        return rgb
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds, and pixels are decoded only here
        raise ImageError(f"{name}: cannot be decoded ({reason(error)})") from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata; the pixels may well be sound
        return 1


def _convert(image: Image.Image, name: str) -> Image.Image:
    """Return a decoded image as RGB. RGB in memory is returned as it is."""
    if image.mode.startswith(("I", "F")):
        return _from_wide_grey(image, name)
    if "transparency" in image.info or image.getbands()[-1] in ("A", "a"):
        image = image.convert("LA") if image.mode == "La" else image  # Pillow knows no way from it to any other mode
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" and not isinstance(image, ImageFile) else image.convert("RGB")


def _from_wide_grey(image: Image.Image, name: str) -> Image.Image:
    """Convert grey of floats ("F"), of 16 bits ("I;16") or of 32 bits ("I") to RGB. Pillow's own conversion clips at 255."""
    values = np.asarray(image)  # [H, W]
    finite = np.isfinite(values)  # [H, W]
    if not finite.any():
        raise ImageError(f"{name}: none of its pixels is a finite number")
    low, high = (float(extreme(values, where=finite, initial=0)) for extreme in (np.min, np.max))
    whites = {"F": (1, *WHITES), "I": WHITES}.get(image.mode, (65535,))
    if image.format == "PPM" and image.mode == "I":
        whites = (65535,)  # Pillow scales the pixels to this value
    below, above = (OVERSHOOT, OVERSHOOT) if image.mode == "F" else (NOISE, 0)
    white = next((white for white in whites if high <= white * (1 + above)), None)
    if white is None or low < -below * white:
        raise ImageError(f"{name}: its pixels go from {low:g} to {high:g}; expected 0 to {', '.join(map(str, whites))}")
    grey = values.astype(np.float32)  # [H, W]
    grey *= np.float32(255 / white)
    np.nan_to_num(grey, copy=False, nan=255, posinf=255, neginf=0)
    np.rint(grey.clip(0, 255, out=grey), out=grey)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def blur(image: Image.Image) -> Image.Image:
    """Return VIG's null image: the RGB image, blurred at its original resolution.

    The filter is a Gaussian with sigma = k - 1, cut off at k pixels, so it is almost a box of k pixels. k depends on the width of
    the image (`BLUR_KERNELS`). Borders are reflected. An axis of n pixels can be reflected by at most n - 1 pixels, so k is at
    most 2n - 1 on this axis; sigma does not change.
    """
    import torch

    kernel = next(k for width, k in BLUR_KERNELS if image.width >= width)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()  # [3, H, W]
    pixels = _blur_last_axis(pixels, kernel)  # [3, H, W]
    pixels = _blur_last_axis(pixels.transpose(1, 2), kernel).transpose(1, 2)  # [3, H, W]
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())  # [H, W, 3]


def _blur_last_axis(pixels: Tensor, kernel: int) -> Tensor:
    """Blur the last axis: [3, M, N] -> [3, M, N]. An FFT is used, because its cost does not grow with the hundreds of taps."""
    import torch
    from torch.nn import functional as F

    length = pixels.shape[-1]
    reach = min(kernel // 2, length - 1)
    taps = torch.arange(-reach, reach + 1, dtype=torch.float64)  # [2*reach+1]
    taps = torch.exp(-0.5 * (taps / (kernel - 1)) ** 2)
    taps = (taps / taps.sum()).float()
    padded = F.pad(pixels, (reach, reach), mode="reflect")  # [3, M, N+2*reach]
    size = padded.shape[-1]
    spectrum = torch.fft.rfft(padded) * torch.fft.rfft(taps, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., 2 * reach :]  # [3, M, N]: the part without wrap-around
