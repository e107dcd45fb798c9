"""Image files are opened here and nowhere else. Only regular files of bounded size, in a listed format and with few enough pixels pass.

A file may come from strangers. It may be a pipe that never ends, a small file that decodes to gigabytes, or a PostScript file with the
suffix .png, for which Pillow would start another program.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from urllib.request import Request, urlopen

from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from PIL.ImageFile import ImageFile

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
"""The formats of Pillow that are opened. Formats of plug-ins, which a program registers with Pillow, are opened too."""
PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": None}
"""Packages that read further formats if they are installed -> the function in the package that registers the formats."""
PLUGIN_STARTS = {b"ftypheic": "HEIC", b"ftypheix": "HEIC", b"ftypmif1": "HEIC", b"ftyphevc": "HEIC", b"JXL \r\n\x87\n": "JPEG XL"}
"""Bytes 4 to 12 of a file -> its format."""
PLUGIN_SUFFIXES = (".heic", ".heif", ".hif", ".jxl")
NO_PICTURES = ("BUFR", "GRIB", "HDF5", "IPTC", "MPEG")
"""Formats that Pillow identifies but cannot show; files with their suffixes are mostly no images."""

ADDRESSES = ("http://", "https://", "data:")
LONGEST_NAME, SECONDS = 200, 60
"""Characters of an address in messages; seconds that a server may be silent."""
PIXELS = 89_478_485
"""Pillow's own default limit, above which it warns. An image with this number of pixels takes 0.4 GB."""


class ImageError(ValueError):
    """An ImageError says that an image cannot be read. The message names the file and the reason."""


def _from_environment(name: str, otherwise: int) -> int:
    given = os.environ.get(name, "")
    if given and not re.fullmatch("[0-9]+", given):
        raise ValueError(f"the environment variable {name} takes a whole number, got {given!r}")
    return int(given or otherwise)


@dataclass(frozen=True)
class ImageLimits:
    """ImageLimits holds the largest sizes of images that are read.

    The environment variables MOF_MAX_IMAGE_BYTES and MOF_MAX_IMAGE_PIXELS set the defaults.

    Raises:
        ValueError: for a limit below 1.
    """

    max_bytes: int = field(default_factory=lambda: _from_environment("MOF_MAX_IMAGE_BYTES", 2**28))
    """Largest size of a file."""
    max_pixels: int = field(default_factory=lambda: _from_environment("MOF_MAX_IMAGE_PIXELS", PIXELS))
    """Largest product of width and height."""

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.max_pixels) < 1:
            raise ValueError(f"limits of images must be at least 1, got {self.max_bytes} bytes and {self.max_pixels} pixels")

    def check_bytes(self, name: str, size: int) -> None:
        """Raise an ImageError for the file `name` if it has more bytes than allowed."""
        if size > self.max_bytes:
            raise ImageError(
                f"{name}: its {size:,} bytes are more than the allowed {self.max_bytes:,}; --max-bytes or MOF_MAX_IMAGE_BYTES raises it"
            )

    def check_pixels(self, name: str, image: Image.Image) -> None:
        """Raise an ImageError for the image `name` if it has more pixels than allowed."""
        if image.width * image.height > self.max_pixels:
            raise ImageError(
                f"{name}: its {image.width} x {image.height} pixels are more than the allowed {self.max_pixels:,}; "
                "--max-pixels or MOF_MAX_IMAGE_PIXELS raises it"
            )
        if (tile := _tile_pixels(image)) > self.max_pixels:
            raise ImageError(f"{name}: its tiles of {tile:,} pixels are more than the allowed {self.max_pixels:,}")


def read_file(path: str | os.PathLike[str], limits: ImageLimits | None = None) -> bytes:
    """Return the content of a regular file.

    Raises:
        ImageError: for a file that is missing, too large, unreadable, or no regular file (a folder, a pipe, a device).
    """
    limits, name = limits or ImageLimits(), os.fspath(path)
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{name}: cannot be read (it is no regular file)")
            limits.check_bytes(name, status.st_size)
            content = file.read(status.st_size + 1)
            if len(content) > status.st_size:  # files in /proc, for example, hold more than their size says
                content += file.read(limits.max_bytes)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such image file") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a name that is too long or has a zero byte
        raise ImageError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    limits.check_bytes(name, len(content))
    return content


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_address(address: str, limits: ImageLimits | None = None) -> bytes:
    """Return the content of an image at an address, which must begin with an entry of `ADDRESSES`.

    Raises:
        ImageError: for another address, or an address that gives nothing or too many bytes.
    """
    limits, name = limits or ImageLimits(), address if len(address) <= LONGEST_NAME else f"{address[:LONGEST_NAME]}..."
    if not address.startswith(ADDRESSES):
        raise ImageError(f"{name}: expected an address that begins with {', '.join(ADDRESSES)}")
    try:
        with urlopen(Request(address, headers={"User-Agent": "mof-vig"}), timeout=SECONDS) as reply:
            content = reply.read(limits.max_bytes + 1)
    except Exception as error:  # sockets, certificates, HTTP and base64 raise errors of many kinds
        raise ImageError(f"{name}: cannot be read ({type(error).__name__})") from error
    limits.check_bytes(name, len(content))
    return content


def inside(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> str:
    """Return the path, joined to the folder, of an image that a list of images names.

    Raises:
        ImageError: for a path that leads out of the folder, because a list from strangers could name any file of this machine.
    """
    root, joined = os.path.abspath(folder), os.path.join(folder, path)
    if os.path.commonpath([root, os.path.abspath(joined)]) != root:
        raise ImageError(
            f"the image path {os.fspath(path)!r} leads out of the image folder {os.fspath(folder)}; to allow all absolute paths, give / as "
            "the folder (--images /)"
        )
    return joined


def open_image(content: bytes, name: str, limits: ImageLimits | None = None) -> ImageFile:
    """Return the image in the content of the file `name`. Its pixels are decoded when they are needed.

    Raises:
        ImageError: for an empty or too large content, a format that is not opened, a damaged header, or too many pixels.
    """
    limits = limits or ImageLimits()
    if not content:
        raise ImageError(f"{name}: the file is empty")
    limits.check_bytes(name, len(content))
    if limits.max_pixels > PIXELS and Image.MAX_IMAGE_PIXELS is not None:  # Pillow also has a limit, for the whole process
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limits.max_pixels)
    try:
        image = Image.open(io.BytesIO(content), formats=formats())
    except UnidentifiedImageError:
        raise ImageError(f"{name}: {_unknown(content)}") from None
    except Exception as error:  # Pillow's readers raise many kinds (struct.error, KeyError, ...) for bad bytes
        raise ImageError(f"{name}: cannot be read as an image ({reason(error)})") from error
    limits.check_pixels(name, image)
    return image


def check_opened(image: Image.Image, name: str, limits: ImageLimits | None = None) -> None:
    """Raise an ImageError for an image that `open_image` would refuse. Only files that are opened and not yet decoded are checked."""
    if not isinstance(image, ImageFile):
        return
    if _is_pillows(type(image)) and image.format not in FORMATS:
        raise ImageError(f"{name}: {image.format} is none of the formats that are opened: {', '.join(FORMATS)}")
    (limits or ImageLimits()).check_pixels(name, image)


def formats() -> list[str]:
    """Return the formats that are opened. Formats that cannot be recognised by the first bytes of a file come last."""
    _load_plugins()
    known = [(name, accept) for name, (factory, accept) in Image.OPEN.items() if name in FORMATS or not _is_pillows(factory)]
    return [name for name, accept in known if accept] + [name for name, accept in known if not accept]


def suffixes() -> frozenset[str]:
    """Return the suffixes of image files, in lower case. Formats that are not opened are included, so their files count as failures."""
    _load_plugins()
    pictures = {suffix for suffix, name in Image.EXTENSION.items() if name == "MPO" or (name in Image.OPEN and name not in NO_PICTURES)}
    return frozenset({*pictures, *PLUGIN_SUFFIXES})


def reason(error: Exception) -> str:
    """Return the class name of an error of Pillow, with its text if the text cannot hold bytes of the file."""
    is_safe = isinstance(error, (OSError, MemoryError, Image.DecompressionBombError))
    return f"{type(error).__name__}: {error}" if is_safe else type(error).__name__


def _tile_pixels(image: Image.Image) -> int:
    """Return the pixels of a tile of a TIFF, which its decoder holds in memory, however small the image is."""
    tags = getattr(image, "tag_v2", None) or {}
    sides = [tags.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)]
    return math.prod(side for side in sides if isinstance(side, int))


@lru_cache
def _load_plugins() -> None:
    Image.init()
    for package, function in PLUGINS.items():
        with suppress(ImportError):
            module = import_module(package)
            if function is not None:
                getattr(module, function)()


def _is_pillows(maker: object) -> bool:
    return getattr(maker, "__module__", "").startswith("PIL.")


def _unknown(content: bytes) -> str:
    """Return the reason why no reader opens a file. The text holds no bytes of the file."""
    if (kind := PLUGIN_STARTS.get(content[4:12])) is not None:
        package = "pillow-heif" if kind == "HEIC" else "pillow-jxl-plugin"
        return f"a {kind} image needs a plug-in: pip install {package}"
    for name, (_, accept) in Image.OPEN.items():
        with suppress(Exception):
            if name not in FORMATS and accept is not None and accept(content[:16]) is True:
                return f"an image in the format {name}, which is none of those that are opened: {', '.join(FORMATS)}"
    return "cannot be read as an image"
