"""This module registers the vision transformers of MoCo v3 (arXiv 2104.02057) with timm, which has the architecture but no weights.

The weights are Meta's own files, vit-s-300ep.pth.tar and vit-b-300ep.pth.tar. Each is a training checkpoint whose `base_encoder` is the
encoder that the authors evaluate.
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

ENCODER = "module.base_encoder."
# Only the training needs these weights: the moving average of the encoder and the two small networks on top.
LEFT_OUT = ("module.momentum_encoder.", "module.predictor.", ENCODER + "head.")


def checkpoint_filter_fn(state: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Return the encoder's weights in a training checkpoint under timm's names. A strict load afterwards reports unknown keys."""
    state = state.get("state_dict", state)
    return {key.removeprefix(ENCODER): value for key, value in state.items() if not key.startswith(LEFT_OUT)}


def _config(size: str) -> dict[str, Any]:
    return {
        "url": f"https://dl.fbaipublicfiles.com/moco-v3/vit-{size}-300ep/vit-{size}-300ep.pth.tar",
        "input_size": (3, 224, 224), "num_classes": 0, "crop_pct": 0.875, "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "license": "cc-by-nc-4.0",
        "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip


default_cfgs = generate_default_cfgs({"mof_mocov3_vit_small.300ep": _config("s"), "mof_mocov3_vit_base.300ep": _config("b")})


@register_model
def mof_mocov3_vit_small(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Return the small transformer. It has twelve heads, while other small vision transformers have six."""
    return _vision_transformer("mof_mocov3_vit_small", pretrained, embed_dim=384, **options)


@register_model
def mof_mocov3_vit_base(pretrained: bool = False, **options: Any) -> VisionTransformer:
    return _vision_transformer("mof_mocov3_vit_base", pretrained, embed_dim=768, **options)


def _vision_transformer(name: str, pretrained: bool, **options: Any) -> VisionTransformer:
    sizes = {"patch_size": 16, "depth": 12, "num_heads": 12}
    return build_model_with_cfg(
        VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, pretrained_strict=True, **(sizes | options)
    )
