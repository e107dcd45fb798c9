"""Image encoders behind one contract: pixels in, patch tokens on a known grid out. Imports none of our packages."""

from encoders.base import Encoder, PatchFeatures
from encoders.image_loader import ImageLoader
from encoders.images import ImageError, read_image
from encoders.registry import available_encoders, build_encoder, register_encoder

__all__ = [
    "Encoder",
    "ImageError",
    "ImageLoader",
    "PatchFeatures",
    "available_encoders",
    "build_encoder",
    "read_image",
    "register_encoder",
]
