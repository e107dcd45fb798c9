"""An encoder of your own beside CLIP, before a language model: `python examples/own_encoder.py`. It takes seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from encoders import Encoder, build_encoder, register_encoder
from mof import InterleavedMoF, MoFForConditionalGeneration
from mof.language_models import load_language_model


class Patches(Encoder):
    """One convolution: the smallest encoder there is. Put your own network in its place."""

    def __init__(self, image_size: int, trainable: bool) -> None:
        sizes = {"width": 32, "depth": 1, "patch_size": 8, "image_size": image_size, "embed_dim": 32}
        super().__init__(nn.Conv2d(3, 32, 8, 8), **sizes, mean=(0.5,) * 3, std=(0.5,) * 3, trainable=trainable)

    def patch_tokens(self, x: Tensor) -> Tensor:
        return self.tower(x).flatten(2).transpose(1, 2)  # [B, h*w, width]

    def image_embedding(self, x: Tensor) -> Tensor:
        return self.patch_tokens(x).mean(dim=1)  # [B, embed_dim]


@register_encoder("patches")
def build_patches(*, image_size: int | None, trainable: bool, **_: object) -> Encoder:
    return Patches(image_size or 40, trainable)


def main() -> None:
    encoders = {"clip": build_encoder("mini-clip"), "own": build_encoder("patches")}
    llm, tokenizer = load_language_model("mini-lm")  # or a hub id, or a folder
    mixer = InterleavedMoF(encoders, hidden_size=llm.config.hidden_size)
    model = MoFForConditionalGeneration.from_parts(mixer, llm, tokenizer)
    pixels = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    print(encoders["own"], model.mixer, f"an image becomes {model.mixer(pixels).shape[1]} tokens", sep="\n")


if __name__ == "__main__":
    main()
