"""Thumbnails as embeddings: they tell a photo that was only compressed or resized from another one of the same thing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from encoders import Encoder

# Shapes: B = images, S = side of a thumbnail in pixels.

SIDE = 16
"""S. Fine enough that a change of a tenth of the picture's side shows, coarse enough that compression does not."""
OFFSET = 8.0
"""A constant beside the pixels (in -0.5..0.5, so of length 8 where all are 0.3 apart from grey): keeps brightness apart."""
SAME_PICTURE = 0.9997
"""Cosine above which two images are one picture. On 296 photos: JPEG of quality 40 and more, and a third or twice the side, stay
above it; half as bright or dark again in a square of a tenth of the side falls below."""


class ThumbnailEncoder(Encoder):
    """The pixels of an S x S thumbnail, as a vector of unit length: the distance of two is the mean difference of their pixels."""

    def __init__(self) -> None:
        tower = nn.ParameterList([torch.tensor([OFFSET])])
        sizes = {"width": 3, "patch_size": 1, "image_size": SIDE, "embed_dim": 3 * SIDE**2 + 1}
        super().__init__(tower, **sizes, depth=1, mean=(0.5,) * 3, std=(1.0,) * 3, fit="squash")  # type: ignore[arg-type]
        self.name = f"thumbnail-{SIDE}"

    def patch_tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)  # [B, S*S, 3]

    def image_embedding(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), self.tower[0].expand(len(x), 1)], dim=1)  # [B, 3*S*S + 1]


__all__ = ["SAME_PICTURE", "SIDE", "ThumbnailEncoder"]
