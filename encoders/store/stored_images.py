"""Images out of a feature store, which a multimodal model takes in place of pixels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from encoders.base import Encoder
from encoders.images.reading import ImageError
from encoders.preprocessing import View
from encoders.store.feature_store import FeatureStore

# Shapes: h, w = the grid of an encoder, D = its width, F = h*w*D added up over the encoders.


@dataclass(frozen=True, eq=False)
class StoredImage:
    """The features of an image."""

    key: str
    """The key of its content, which is equal for the same file under several names."""
    features: Tensor
    """[F], the tokens [h*w, D] of each encoder, flattened, one after the other: a row of the model's `encoder_features`."""


class StoredImages:
    """Looks images up in a store by content. It is called like `read_image`: `StoredImages(...)(path)`.

    Args:
        store: written with `--tokens`, by `mof encode --model`.
        encoders: the model's, `model.mixer.encoders`: their order is that of the features.
        view: how the model sees an image, `processor.image_processor.view`; for its null images, the same but blurred.

    Raises:
        ValueError: for a store without these encoders, or made by others of the same name.
    """

    def __init__(self, store: FeatureStore, encoders: Mapping[str, Encoder], view: View) -> None:
        for name, encoder in encoders.items():
            store.check(name, encoder, view)
        self.store, self.names, self.view = store, list(encoders), view

    @property
    def description(self) -> dict[str, str]:
        """The fingerprint and the format of the features, by encoder (JSON-able, for manifests)."""
        entries = {name: self.store.manifest[name] for name in self.names}
        return {name: f"{entry['fingerprint']} {entry['tokens']}" for name, entry in entries.items()}

    def __call__(self, image: str | os.PathLike[str] | Image.Image) -> StoredImage:
        """ImageError for an image that is not in the store, or is not given as a file."""
        if not isinstance(image, (str, os.PathLike)):
            raise ImageError(f"images out of a feature store are asked for by their files, got a {type(image).__name__}")
        try:
            row = self.store.row_of(image)
        except ValueError as error:
            raise ImageError(str(error)) from error
        tokens = [self.store.tokens(name, [row]).flatten() for name in self.names]  # [h*w*D] each
        return StoredImage(self.store.keys[row], torch.cat(tokens))
