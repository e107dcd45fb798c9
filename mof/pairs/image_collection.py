"""Images become embeddings in a feature store, which are searched for blind pairs. Embeddings of thumbnails tell copies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from encoders import Encoder, FeatureStore, build_encoder, encode_images
from encoders.images.sources import ImageSources
from encoders.storage import located
from encoders.store.files import FAILURES, read_index, read_view

# Shapes: N = images, B = images of a batch, E = width of an embedding, which differs between encoders, S = side of a thumbnail in pixels.

SIDE = 16
"""S: fine enough that a change of a tenth of the image's side shows, coarse enough that compression does not."""
OFFSET = 8.0
"""A constant beside the pixels keeps brightness apart. The pixels are in -0.5..0.5: their length is 8 if all are 0.3 from grey."""
SAME_PICTURE = 0.9997
"""Cosine above which two images are copies of one picture. On 296 photos, JPEG compression of quality 40 and more, and resizing to a
third or twice the side, stay above it; a square of a tenth of the side that is made half as bright or dark again falls below."""

BLANK = 0.02
"""An image is blank if its thumbnail's pixels (0 to 1) have a smaller standard deviation: 5 of 255 levels."""
TINY = 8
"""Images with fewer pixels along a side are tiny."""


@dataclass(frozen=True)
class ImageCollection:
    """ImageCollection holds N images of different contents with their embeddings, of unit norm."""

    names: list[str]
    """[N] absolute paths; a tar's member is "path of the tar/name in it"."""
    clips: list[NDArray[np.float32]]
    """[N, E] each"""
    dinos: list[NDArray[np.float32]]
    """[N, E] each"""
    thumbnails: NDArray[np.float32]
    """[N, E], from `ThumbnailEncoder`"""
    duplicates: int
    """Number of further names of these contents."""
    unreadable: dict[str, str]
    """name -> reason"""
    blank: list[str]
    """Names of blank and tiny images that were left out."""

    def __len__(self) -> int:
        return len(self.names)


def encode_collection(
    images: str | Path | Sequence[str | Path],
    clip: Sequence[str],
    dino: Sequence[str],
    store: str | Path,
    *,
    image_size: int | None = None,
    drop_blank: bool = False,
    **options: Any,
) -> ImageCollection:
    """Encode the images that the store lacks, and return all of them with their embeddings.

    Args:
        images: as for `encode_images`.
        clip, dino: names of encoders, as `build_encoder` takes them.
        store: a feature store; made if need be. It may hold other images and encoders, too.
        image_size: side of the encoders' input in pixels; None: their own.
        drop_blank: leave out images of one colour (`BLANK`) and of a few pixels (`TINY`). Encoders do not agree about them, so that they
            would stand at the top of the pairs.
        options: further options of `encode_images`.

    Raises:
        ValueError: for an encoder without embeddings of whole images, for images none of which can be read or all of which are
            left out, and as `build_encoder` and `encode_images` do.
    """
    sources = ImageSources(images)  # a wrong path is told before encoders are built
    encoders = {name: build_encoder(name, image_size=image_size) for name in dict.fromkeys([*clip, *dino])}
    if without := [name for name, encoder in encoders.items() if encoder.embed_dim is None]:
        raise ValueError(f"{', '.join(without)} has no embedding of a whole image, which the search compares; choose another encoder")
    thumbnail = ThumbnailEncoder()
    report = encode_images(images, {**encoders, thumbnail.name: thumbnail}, store, **options)
    store = located(store)
    with (store / FAILURES).open(encoding="utf-8") as lines:
        unreadable = {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}
    if not report.images:
        raise ValueError(f"none of the images can be read; the first: {next(iter(unreadable.values()))}")
    opened = FeatureStore(store, [*encoders, thumbnail.name])
    index = read_index(store)
    key_of = dict(zip(index["name"].to_pylist(), index["key"].to_pylist(), strict=True))  # the last key of a changed file
    name_of: dict[int, str] = {}
    seen = read_view(store) or set()
    names = sources.among(name for name in key_of if name in seen)
    for name in names:
        name_of.setdefault(opened.row_of(key_of[name]), name)
    rows = np.array(sorted(name_of))  # [N]
    blank = np.zeros(len(rows), bool)
    if drop_blank:
        blank = _blank(opened.embeddings(thumbnail.name)[rows]) | _tiny(index, [opened.keys[row] for row in rows.tolist()])
        if blank.all():
            raise ValueError(f"all {len(rows)} images are blank or tiny, such as {name_of[rows[0]]}")
    left_out, rows, copies = rows[blank], rows[~blank], len(names) - len(rows)

    def embeddings(encoder: str) -> NDArray[np.float32]:
        every = opened.embeddings(encoder)
        return every if len(every) == len(rows) else every[rows]  # [N, E]

    return ImageCollection(
        [name_of[row] for row in rows.tolist()],
        [embeddings(name) for name in clip],
        [embeddings(name) for name in dino],
        embeddings(thumbnail.name),
        copies,
        unreadable,
        [name_of[row] for row in left_out.tolist()],
    )


def _blank(thumbnails: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return whether each image is of one colour, shape [N], for the embeddings [N, E] of a `ThumbnailEncoder`."""
    pixels = thumbnails[:, :-1] * (OFFSET / thumbnails[:, -1:])  # [N, 3*S*S]
    return pixels.reshape(len(pixels), 3, -1).std(axis=2).max(axis=1) < BLANK  # [N]


def _tiny(index: pa.Table, keys: Sequence[str]) -> NDArray[np.bool_]:
    """Return whether the image of each key [N] has too few pixels along a side, shape [N]."""
    columns = (index[name].to_pylist() for name in ("key", "width", "height"))
    side = {key: min(width, height) for key, width, height in zip(*columns, strict=True)}
    return np.array([side[key] < TINY for key in keys])


class ThumbnailEncoder(Encoder):
    """ThumbnailEncoder gives the pixels of an S x S thumbnail as a vector of unit length.

    The distance of two vectors is the mean difference of the pixels. It tells a photo that was only compressed or resized from another
    photo of the same thing.
    """

    def __init__(self) -> None:
        tower = nn.ParameterList([torch.tensor([OFFSET])])
        width = 3 * SIDE**2 + 1
        super().__init__(
            tower, width=3, depth=1, patch_size=1, embed_dim=width, image_size=SIDE, fit="squash", mean=(0.5,) * 3, std=(1.0,) * 3
        )
        self.name = f"thumbnail-{SIDE}"

    def patch_tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)  # [B, S*S, 3]

    def image_embedding(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), self.tower[0].expand(len(x), 1)], dim=1)  # [B, 3*S*S + 1]
