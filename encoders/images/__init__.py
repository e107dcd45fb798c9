"""From files to pixels: reading, decoding, resizing; folders, lists and tars of images."""

from encoders.images.reading import ImageError, read_image

__all__ = ["ImageError", "read_image"]
