"""These functions convert encoders for published layouts: to transformers' CLIPVisionModel or SiglipVisionModel, or torch.hub's DINOv2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import open_clip
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, PretrainedConfig

from encoders import Encoder
from encoders.backends.hf import HFEncoder
from encoders.backends.open_clip import OpenClipEncoder
from encoders.backends.timm import TimmEncoder
from encoders.backends.torch_hub import DinoV2, TorchHubEncoder
from encoders.names import first_names
from mof.llava.towers import VISION
from mof.mixer import Mixer

if TYPE_CHECKING:
    from mof.image_processor import MoFImageProcessor

# Shapes: D the width of a tower.

OPEN_CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Name in open_clip -> name in transformers, for the parts of a tower and of a block."""


def refuse_pooled(mixer: Mixer) -> None:
    """Raise a ValueError if the mixer pools or interpolates the tokens of an encoder, or weighs its layers."""
    if mixer.layer_weights:
        raise ValueError(f"layers of {', '.join(mixer.layer_weights)} are added with learnt weights: no published layout says so")
    for name, encoder in mixer.encoders.items():
        if mixer.pool != (1, 1) or encoder.grid != mixer.grid:
            raise ValueError(
                f"encoder {name} gives {encoder.grid} tokens, pooled from {mixer.grid} by {mixer.pool}: no published layout says so"
            )


def refuse_tiles(images: MoFImageProcessor) -> None:
    """Raise a ValueError for images that are cut into tiles."""
    if images.max_tiles > 1:
        raise ValueError(f"images have up to {images.max_tiles} tiles: no published layout says so; set max_tiles=1 to export without them")


def as_vision_model(encoder: Encoder) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Return config and weights of a vision model of transformers that gives this encoder's features.

    Raises:
        ValueError: for an encoder that is neither CLIP nor SigLIP, or that transformers' LLaVA would run in another way.
    """
    if encoder.norm:
        raise ValueError(f"{encoder.name} norms its patch tokens, which LLaVA never does: no published layout can hold it")
    if isinstance(encoder, OpenClipEncoder) and type(encoder.tower.visual) is open_clip.transformer.VisionTransformer:
        return _from_open_clip(encoder)
    if not isinstance(encoder, HFEncoder):
        raise ValueError(
            f"{encoder.name} ({type(encoder).__name__}) has no counterpart in transformers' LLaVA: expected CLIP or SigLIP of hf, or "
            "one of open_clip's own vision transformers"
        )
    tower = encoder.tower.get_submodule(encoder.family.tower)
    config = encoder.tower.config
    config = config.vision_config if encoder.family.tower else config
    if config.model_type not in VISION:
        raise ValueError(f"{encoder.name} is a {config.model_type!r} model; LLaVA layouts take {', '.join(VISION)}")
    if config.image_size != encoder.image_size:
        raise ValueError(
            f"{encoder.name} looks at {encoder.image_size} pixels with positions for {config.image_size}, which transformers' LLaVA "
            "would refuse: only the native size can be written"
        )
    return config, tower.state_dict()


def _from_open_clip(encoder: OpenClipEncoder) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Return config and weights of a CLIPVisionModel for open_clip's own vision transformer, without projection and text tower."""
    visual = encoder.tower.visual
    block: Any = visual.transformer.resblocks[0]
    activations = {nn.GELU: "gelu", open_clip.transformer.QuickGELU: "quick_gelu"}
    plain = visual.attn_pool is None and isinstance(block.ls_1, nn.Identity) and not isinstance(visual.ln_pre, nn.Identity)
    if not plain or type(block.mlp.gelu) not in activations:
        raise ValueError(
            f"{encoder.name} differs from OpenAI's architecture (attention pool, layer scale, norms), which CLIPVisionModel cannot hold"
        )
    config = CLIPVisionConfig(
        hidden_size=encoder.width,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        patch_size=encoder.patch_size,
        image_size=encoder.image_size,
        hidden_act=activations[type(block.mlp.gelu)],
        layer_norm_eps=block.ln_1.eps,
    )
    state: dict[str, Tensor] = {}
    for key, value in visual.state_dict().items():
        if key == "proj":
            continue
        prefix, rest = "", key
        if key.startswith("transformer.resblocks."):
            _, _, number, rest = key.split(".", 3)
            prefix = f"encoder.layers.{number}."
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for name, third in zip("qkv", value.chunk(3), strict=True):  # [3D, D] or [3D] -> 3 of [D, D] or [D]
                state[f"{prefix}self_attn.{name}_proj.{kind}"] = third
            continue
        stem, dot, kind = (rest, "", "") if rest in OPEN_CLIP_NAMES else rest.rpartition(".")
        state[f"{prefix}{OPEN_CLIP_NAMES[stem]}{dot}{kind}"] = value
    return config, state


def as_torch_hub(encoder: Encoder) -> dict[str, Tensor]:
    """Return torch.hub's name -> weight of a DINOv2.

    Raises:
        ValueError: for an encoder that is no DINOv2 of torch.hub or timm, or that returns another layer than the released MoF code.
    """
    if encoder.norm or encoder.layer not in (-1, encoder.blocks) or encoder.blocks != len(getattr(encoder.tower, "blocks", ())):
        raise ValueError(
            f"{encoder.name} gives layer {encoder.layer}, norm {encoder.norm}; the released layout knows the last block, not normed"
        )
    state: dict[str, Tensor] = encoder.tower.state_dict()
    if isinstance(encoder, TorchHubEncoder):
        return state
    width = encoder.width
    with torch.device("meta"):
        wanted = DinoV2(width, encoder.blocks, 1, encoder.patch_size, encoder.image_size).state_dict()
    # Only pre-training uses the mask token, so timm drops it.
    state = {"mask_token": torch.zeros(1, width, dtype=next(iter(state.values())).dtype), **state}
    shapes, wanted_shapes = ({(key, value.shape) for key, value in weights.items()} for weights in (state, wanted))
    wrong = sorted({key for key, _ in shapes ^ wanted_shapes})
    if wrong or not isinstance(encoder, TimmEncoder):
        raise ValueError(
            f"{encoder.name} ({type(encoder).__name__}) is no DINOv2 as torch.hub has it: expected one of torch_hub, or of timm without "
            f"registers{f'; {len(wrong)} weights differ: {first_names(wrong)}' if wrong else ''}"
        )
    return state
