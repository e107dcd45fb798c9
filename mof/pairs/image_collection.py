"""Images as the two sets of embeddings that are searched for blind pairs, by way of a feature store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders import FeatureStore, build_encoder, encode_images
from encoders.images.sources import ImageSources
from encoders.store.files import FAILURES, read_index
from mof.pairs.thumbnail_encoder import ThumbnailEncoder

# Shapes: N = images, E = width of an embedding, which differs between encoders.


@dataclass(frozen=True)
class ImageCollection:
    """N images of different contents with their embeddings, of unit norm."""

    names: list[str]
    """[N] absolute paths; a tar's member is "path of the tar/name in it"."""
    clips: list[NDArray[np.float32]]
    """[N, E] each"""
    dinos: list[NDArray[np.float32]]
    """[N, E] each"""
    thumbnails: NDArray[np.float32]
    """[N, E] of `ThumbnailEncoder`"""
    duplicates: int
    """Further names of these contents."""
    unreadable: dict[str, str]
    """name -> reason"""

    def __len__(self) -> int:
        return len(self.names)


def encode_collection(
    images: str | Path | Sequence[str | Path],
    clip: Sequence[str],
    dino: Sequence[str],
    store: str | Path,
    *,
    image_size: int | None = None,
    **options: Any,
) -> ImageCollection:
    """Encode what the store lacks of these images, and look up all of them.

    Args:
        images: as for `encode_images`.
        clip, dino: names of encoders, as `build_encoder` takes them; several on each side.
        store: a feature store; made if need be. It may hold other images and encoders, too.
        image_size: side of the encoders' input in pixels; their own by default.
        options: further ones of `encode_images`.

    Raises:
        ValueError: for an encoder without embeddings of whole images, for images none of which can be read, and as
            `build_encoder` and `encode_images` do.
    """
    encoders = {name: build_encoder(name, image_size=image_size) for name in dict.fromkeys([*clip, *dino])}
    if without := [name for name, encoder in encoders.items() if encoder.embed_dim is None]:
        raise ValueError(f"{', '.join(without)} has no embedding of a whole image, which the search compares; choose another encoder")
    thumbnail = ThumbnailEncoder()
    report = encode_images(images, {**encoders, thumbnail.name: thumbnail}, store, **options)
    lines = (Path(store) / FAILURES).read_text(encoding="utf-8").splitlines()
    unreadable = {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}
    if not report.images:
        raise ValueError(f"none of the images can be read; the first: {next(iter(unreadable.values()))}")
    opened = FeatureStore(store, [*encoders, thumbnail.name])
    index = read_index(Path(store))
    key_of = dict(zip(index["name"].to_pylist(), index["key"].to_pylist(), strict=True))  # of a changed file the last
    name_of: dict[int, str] = {}
    names = [name for name in ImageSources(images).among(key_of) if name not in unreadable]
    for name in names:
        name_of.setdefault(opened.row_of(key_of[name]), name)
    rows = np.array(sorted(name_of))  # [N]

    def embeddings(encoder: str) -> NDArray[np.float32]:
        every = opened.embeddings(encoder)
        return every if len(every) == len(rows) else every[rows]  # [N, E]

    return ImageCollection(
        [name_of[row] for row in rows.tolist()],
        [embeddings(name) for name in clip],
        [embeddings(name) for name in dino],
        embeddings(thumbnail.name),
        len(names) - len(rows),
        unreadable,
    )


__all__ = ["ImageCollection", "encode_collection"]
