"""An encoder that kills its process at a picture of one colour: what a fault in a decoder or a driver does."""

from __future__ import annotations

import os

from torch import Tensor

from support.tiny import TinyEncoder


class KillingEncoder(TinyEncoder):
    def __init__(self) -> None:
        super().__init__(width=16, patch_size=8, image_size=32, mean=0.5, seed=1)

    def image_embedding(self, x: Tensor) -> Tensor:
        if (x.flatten(1).amax(1) == x.flatten(1).amin(1)).any():
            os._exit(1)
        return super().image_embedding(x)
