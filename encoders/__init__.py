"""Image encoders behind one contract: pixels in, patch tokens on a known grid out. Imports none of our packages."""

from encoders.base import Encoder, PatchFeatures
from encoders.feature_store import FeatureStore
from encoders.fingerprints import View
from encoders.image_loader import ImageLoader
from encoders.images import ImageError, read_image
from encoders.registry import available_encoders, build_encoder, register_encoder
from encoders.store_report import EncodeReport
from encoders.store_writer import encode_images
from encoders.stored_images import StoredImage, StoredImages

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
