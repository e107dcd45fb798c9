"""Two encoders that see one half of a picture each: `left-half` is blind to what the right half shows, and the other way round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encoders import Encoder, available_encoders, register_encoder


class HalfEncoder(Encoder):
    """The mean colour of one half, less grey."""

    flexible = True

    def __init__(self, half: slice, **options: Any) -> None:
        tower = nn.ParameterList([torch.tensor([float(half.start)])])
        sizes = {"width": 3, "patch_size": 8, "image_size": 16, "embed_dim": 3}
        super().__init__(tower, **sizes, depth=1, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash", **options)
        self.half, self.runs = half, 0

    def patch_tokens(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 8).flatten(2).transpose(1, 2)  # [B, h*w, 3]

    def image_embedding(self, x: Tensor) -> Tensor:
        RUNS.append(len(x))
        return x[..., self.half].mean((2, 3))  # [B, 3]


RUNS: list[int] = []
"""Images of every batch that one of them has encoded."""


def _register(key: str, half: slice) -> None:
    if key in available_encoders():
        return

    def factory(trainable: bool, **_: Any) -> Encoder:
        return HalfEncoder(half, trainable=trainable)

    register_encoder(key)(factory)


_register("left-half", slice(0, 6))
_register("right-half", slice(10, 16))
