from .base import Encoder, PatchFeatures
from .images.loader import ImageLoader
from .images.opening import ImageError, ImageLimits
from .images.reading import read_image
from .preprocessing import Preprocessing, View
from .registry import available_encoders, build_encoder, register_encoder
from .store.feature_store import FeatureStore, StoredImage, StoredImages
from .store.writer import EncodeReport, encode_images

__all__ = [
    "EncodeReport",
    "Encoder",
    "FeatureStore",
    "ImageError",
    "ImageLimits",
    "ImageLoader",
    "PatchFeatures",
    "Preprocessing",
    "StoredImage",
    "StoredImages",
    "View",
    "available_encoders",
    "build_encoder",
    "encode_images",
    "read_image",
    "register_encoder",
]
