"""Vision transformers of timm: DINO, DINOv2, MAE, SigLIP, EVA, BEiT and whatever else shares their classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from encoders.base import Encoder
from encoders.checkpoints import WeightsError, explain_download, load_strict, read_state, refuse_misfit
from encoders.positions import Positions
from encoders.registry import near_names, split_weights

# Shapes: B, S, h, w, D, E as in base.py; P = prefix tokens (class and register tokens), L = P + h*w.

# The classes that give patch tokens, with timm's converters from the original authors' checkpoints.
CONVERTERS: dict[type, Callable[[dict[str, Tensor], Any], dict[str, Tensor]]] = {
    vision_transformer.VisionTransformer: vision_transformer.checkpoint_filter_fn,
    eva.Eva: eva.checkpoint_filter_fn,
    beit.Beit: beit.checkpoint_filter_fn,
}


class TimmEncoder(Encoder):
    """A vision transformer of timm without its classifier. `embed_image` gives its pooled output, as timm pools it."""

    def __init__(self, trunk: Any, **options: Any) -> None:
        config = resolve_data_config(model=trunk)
        super().__init__(
            trunk,
            **facts(trunk),
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            embed_dim=trunk.num_features,
            flexible=True,
            **options,
        )
        self._positions = Positions()

    def patch_tokens(self, x: Tensor) -> Tensor:
        return run_blocks(self.tower, x, self.blocks, self.norm)  # [B, h*w, D]

    def image_embedding(self, x: Tensor) -> Tensor:
        return self.tower(x)  # [B, D]

    def change_input_size(self, image_size: int) -> None:
        resize(self.tower, image_size, self._positions)


def facts(trunk: Any) -> dict[str, Any]:
    """Width, depth, patch and image size of a timm model. ValueError for one that is no vision transformer."""
    kinds: tuple[Any, ...] = tuple(CONVERTERS)
    if not isinstance(trunk, kinds):
        raise ValueError(
            f"timm's {type(trunk).__name__} gives no patch tokens that this backend knows; it takes "
            f"{', '.join(kind.__name__ for kind in kinds)}"
        )
    return {
        "width": trunk.embed_dim,
        "depth": len(trunk.blocks),
        "patch_size": trunk.feature_info[-1]["reduction"],  # not patch_embed's: its patches may lie on a stem's grid
        "image_size": trunk.patch_embed.img_size[0],
    }


def resize(trunk: Any, image_size: int, positions: Positions) -> None:
    """Make a timm model take square inputs of `image_size` pixels."""
    table, grid = trunk.pos_embed, trunk.patch_embed.grid_size
    trunk.set_input_size((image_size, image_size))
    if table is not None:  # some have rotary or relative positions only
        new_size, prefix = trunk.patch_embed.grid_size, 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        trunk.pos_embed = positions.resampled(
            table,
            grid,
            lambda table, grid: resample_abs_pos_embed(table, new_size, list(grid), num_prefix_tokens=prefix),
        )


def run_blocks(trunk: Any, x: Tensor, blocks: int, norm: bool) -> Tensor:
    """[B, 3, S, S] -> [B, h*w, D]: the output of block `blocks`, the rest not run, prefix tokens cut off."""
    if blocks == 0:
        return _embed(trunk, x, norm)
    (tokens,) = trunk.forward_intermediates(x, indices=[blocks - 1], norm=norm, stop_early=True, intermediates_only=True, output_fmt="NLC")
    return tokens  # [B, h*w, D]


def _embed(trunk: Any, x: Tensor, norm: bool) -> Tensor:
    """Layer 0: patches with their positions, before any block."""
    if not isinstance(trunk, vision_transformer.VisionTransformer):
        raise ValueError(f"timm gives no embeddings (layer 0) for {type(trunk).__name__}; choose a layer of 1 or more")
    x = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(x)))  # [B, L, D]
    return (trunk.norm(x) if norm else x)[:, trunk.num_prefix_tokens :]  # [B, h*w, D]


def build(model: str, *, pretrained: bool, weights: str | None, **options: Any) -> TimmEncoder:
    """The encoder of "model[.tag][/file]", "hf-hub:org/model" or "local-dir:folder"."""
    model_name, file = split_weights(model)
    file = weights or file
    _check_name(model_name)
    if pretrained and file is None:
        with explain_download(f"the weight file of {model_name}{_hub_id(model_name)}"):
            trunk = timm.create_model(model_name, pretrained=True, num_classes=0)
        return TimmEncoder(trunk, **options)
    encoder = TimmEncoder(timm.create_model(model_name, pretrained=False, num_classes=0), **options)
    if pretrained and file is not None:
        _load(encoder.tower, file)
    return encoder


def _check_name(model_name: str) -> None:
    """ValueError naming near models or tags for one that timm does not have."""
    if ":" in model_name:
        return  # on the hub or in a folder
    architecture, _, tag = model_name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {architecture!r}.{near_names(architecture, timm.list_models())}")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and model_name not in tagged:
        raise WeightsError(f"timm has no weights {tag!r} for {architecture}; it has: {', '.join(tagged) or 'none'}")


def _hub_id(model_name: str) -> str:
    """' (model.safetensors of hub/id)' for a model that timm keeps on the hub, else ''."""
    config = timm.get_pretrained_cfg(model_name, allow_unregistered=True) if ":" not in model_name else None
    return f" (model.safetensors of {config.hf_hub_id} on the hub)" if config and config.hf_hub_id else ""


def _load(trunk: nn.Module, file: str) -> None:
    """Load a local file. Keys that are not timm's own (Meta's DINOv2, OpenAI's CLIP) go through timm's converter."""
    state = read_state(file)
    for key in ("head.weight", "head.bias"):
        state.pop(key, None)  # a classifier, which this trunk does not have
    wanted = {key: value.shape for key, value in trunk.state_dict().items()}
    if {key: value.shape for key, value in state.items()} != wanted:
        convert = next(convert for kind, convert in CONVERTERS.items() if isinstance(trunk, kind))
        with refuse_misfit(file):
            state = convert(state, trunk)
    load_strict(trunk, state, file)
