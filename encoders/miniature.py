"""This module registers `mof_mini_vit` with timm, the miniature vision transformer of mini-clip and mini-dino.

It takes 40 x 40 pixels as 5 x 5 patches of 8 pixels, and has 4 blocks of width 192. Three strided convolutions embed the patches,
because with a single linear layer this small network learned almost nothing in the few minutes of its training.
"""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm2d, PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn


class ConvStemEmbed(PatchEmbed):
    """ConvStemEmbed is timm's patch embedding, with three 3 x 3 convolutions of stride 2 in place of a single convolution of stride 8."""

    def __init__(self, *args: Any, in_chans: int = 3, embed_dim: int = 192, **options: Any) -> None:
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, **options)
        where = {"device": options.get("device"), "dtype": options.get("dtype")}
        layers: list[nn.Module] = []
        for width in (32, 64):
            layers += [nn.Conv2d(in_chans, width, 3, 2, 1, **where), LayerNorm2d(width, **where), nn.GELU()]
            in_chans = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(in_chans, embed_dim, 3, 2, 1, **where))


default_cfgs = generate_default_cfgs({
    "mof_mini_vit.untrained": {
        "input_size": (3, 40, 40), "num_classes": 0, "interpolation": "bicubic", "crop_pct": 1.0,
        "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "first_conv": "patch_embed.proj.0", "classifier": "head",
    }
})  # fmt: skip


@register_model
def mof_mini_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    size = {"img_size": 40, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 6, "embed_layer": ConvStemEmbed}
    return build_model_with_cfg(VisionTransformer, "mof_mini_vit", pretrained, **(size | options))
