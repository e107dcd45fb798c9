"""Small JPEG files of images, for pages."""

from __future__ import annotations

import io

from PIL import Image

QUALITY, TINY = 70, 100
"""Quality of the JPEG files; and the side in pixels below which a page shows single pixels, so that the quality is higher."""


def thumbnail(image: Image.Image, side: int) -> bytes:
    """Return the image as a JPEG file whose longest side has at most `side` pixels."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((side, side), reducing_gap=2.0)
    tiny = max(small.size) < TINY
    small.save(file, "JPEG", quality=95 if tiny else QUALITY, subsampling=0 if tiny else 2, optimize=True)
    return file.getvalue()
