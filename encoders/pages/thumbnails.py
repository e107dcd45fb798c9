"""These functions make small copies of images for pages."""

from __future__ import annotations

import io

from PIL import Image

from encoders.pages import data_uri

QUALITY, TINY, EXACT = 70, 100, 64
"""Quality of the JPEG files; the side in pixels below which a page shows single pixels, so that the quality is higher; and the side
up to which `thumbnail_uri` keeps an image to the bit."""


def thumbnail(image: Image.Image, side: int) -> bytes:
    """Return the image as a JPEG file whose longest side has at most `side` pixels."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((side, side), reducing_gap=2.0)
    tiny = max(small.size) < TINY
    small.save(file, "JPEG", quality=95 if tiny else QUALITY, subsampling=0 if tiny else 2, optimize=True)
    return file.getvalue()


def thumbnail_uri(image: Image.Image, side: int) -> str:
    """Return a data: address that holds the `thumbnail`; tiny images stay as they are, as PNG."""
    if max(image.size) > min(EXACT, side):
        return data_uri(thumbnail(image, side), "jpeg")
    file = io.BytesIO()
    image.save(file, "PNG")
    return data_uri(file.getvalue(), "png")
