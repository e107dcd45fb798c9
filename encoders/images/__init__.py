"""Images: files are read, decoded and resized to pixels; folders, lists and tars are searched."""

from encoders.images.reading import ImageError, read_image

__all__ = ["ImageError", "read_image"]
