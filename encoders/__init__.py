"""Image encoders behind one contract: pixels in, patch tokens on a known grid out. Imports none of our packages."""

from encoders.base import Encoder, PatchFeatures
from encoders.images.loader import ImageLoader
from encoders.images.reading import ImageError, read_image
from encoders.registry import available_encoders, build_encoder, register_encoder
from encoders.store.feature_store import FeatureStore
from encoders.store.fingerprints import View
from encoders.store.report import EncodeReport
from encoders.store.stored_images import StoredImage, StoredImages
from encoders.store.writer import encode_images

__all__ = [
    "EncodeReport",
    "Encoder",
    "FeatureStore",
    "ImageError",
    "ImageLoader",
    "PatchFeatures",
    "StoredImage",
    "StoredImages",
    "View",
    "available_encoders",
    "build_encoder",
    "encode_images",
    "read_image",
    "register_encoder",
]
