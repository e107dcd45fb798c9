"""This backend builds networks of timm with intermediate features: vision transformers, windowed and convolutional networks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

import encoders.backends.moco_v3  # registers its networks with timm
import encoders.miniature  # noqa: F401  registers its network with timm
from encoders.backends.blocks import BlockEncoder, Positions
from encoders.images.resizing import Fit
from encoders.names import near_names, split_weights
from encoders.weight_files import (
    WeightsError,
    cached_instead,
    explain_download,
    first_file,
    load_strict,
    read_state,
    refuse_misfit,
    warn_of_activation,
    without_prefix,
)

# Shapes: B, S, h, w, D, E as in base.py; C = channels of a feature map, P = prefix tokens (class and register tokens), L = P + h*w.

# In these networks all blocks have the same width and grid, and the final norm fits every block.
TRANSFORMERS: tuple[Any, ...] = (vision_transformer.VisionTransformer, eva.Eva, beit.Beit)

FITS: dict[str, Fit] = {"center": "crop", "squash": "squash", "border": "pad"}  # timm's crop_mode


class TimmEncoder(BlockEncoder):
    """TimmEncoder is a network of timm without its classifier. `embed_image` returns timm's pooled output, with unit norm."""

    def __init__(self, trunk: Any, *, norm: bool | None = None, **options: Any) -> None:
        config = resolve_data_config(model=trunk)
        size = trunk.patch_embed.img_size if isinstance(trunk, TRANSFORMERS) else config["input_size"][1:]
        super().__init__(
            trunk,
            **sizes(trunk, bool(norm)),
            image_size=size[0],
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            fit=FITS[config["crop_mode"]],
            crop_pct=config["crop_pct"],
            embed_dim=trunk.head_hidden_size,
            norm=norm,
            **options,
        )
        self.prefix_tokens, self.flexible = prefix_tokens(trunk), takes_any_size(trunk)
        self._positions = Positions()
        self.watch_blocks()

    def blocks_and_norm(self) -> tuple[nn.ModuleList, nn.Module] | None:
        return blocks_and_norm(self.tower)

    def stage_tokens(self, x: Tensor) -> Tensor:
        return read_stages(self.tower, x, self.layers, self.norm)  # [B, h*w, D]

    def image_embedding(self, x: Tensor) -> Tensor:
        return self.tower(x)  # [B, E]

    def change_input_size(self, image_size: int) -> None:
        resize(self.tower, image_size, self._positions)

    def measure_grid(self) -> tuple[int, int]:
        return super().measure_grid() if blocks_and_norm(self.tower) else stage_grid(self.tower, self.image_size, self.layers, self.norm)


def sizes(trunk: Any, norm: bool) -> dict[str, Any]:
    """Return the arguments width, patch_size (both by layer) and depth of `Encoder` for a timm model.

    Raises:
        ValueError: for a model without intermediate features in timm.
    """
    if not callable(getattr(trunk, "forward_intermediates", None)):
        raise ValueError(f"timm's {type(trunk).__name__} gives no intermediate features (forward_intermediates), so no patch tokens")
    stages = trunk.feature_info
    width = {layer: stage["num_chs"] for layer, stage in enumerate(stages, start=1)}
    stride = {layer: stage["reduction"] for layer, stage in enumerate(stages, start=1)}
    if isinstance(trunk, TRANSFORMERS):
        width[0], stride[0] = width[1], stride[1]
    if norm and not isinstance(trunk, TRANSFORMERS):
        width = {len(stages): trunk.num_features}  # width of the input of the network's head, after the last norm or convolution
    return {"width": width, "patch_size": stride, "depth": len(stages)}


def prefix_tokens(trunk: Any) -> int:
    return getattr(trunk, "num_prefix_tokens", 0)  # convolutional networks have none


def takes_any_size(trunk: Any) -> bool:
    return callable(getattr(trunk, "set_input_size", None)) or not trunk.pretrained_cfg.get("fixed_input_size", False)


def resize(trunk: Any, image_size: int, positions: Positions) -> None:
    """Make a timm model take square inputs of `image_size` pixels. A model without positions needs no change."""
    if not callable(getattr(trunk, "set_input_size", None)):
        return
    transformer = isinstance(trunk, TRANSFORMERS)
    table, grid = (trunk.pos_embed, trunk.patch_embed.grid_size) if transformer else (None, (0, 0))
    trunk.set_input_size((image_size, image_size))
    if table is not None:  # models with rotary or relative positions only have no table
        prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        trunk.pos_embed = positions.resampled(table, grid, trunk.patch_embed.grid_size, prefix)


def blocks_and_norm(trunk: Any) -> tuple[nn.ModuleList, nn.Module] | None:
    """Return the blocks and the final norm of a transformer, or None for other networks."""
    return (trunk.blocks, trunk.norm) if isinstance(trunk, TRANSFORMERS) else None


def read_stages(trunk: Any, x: Tensor, layers: Sequence[int], norm: bool) -> Tensor:
    """Return the outputs of stages side by side: [B, 3, S, S] -> [B, h*w, D]. No deeper stage runs."""
    return stage_maps(trunk, x, layers, norm).flatten(2).transpose(1, 2)  # [B, h*w, D]


def stage_maps(trunk: Any, x: Tensor, layers: Sequence[int], norm: bool) -> Tensor:
    """Return the outputs of stages, with their channels side by side, as maps: [B, 3, S, S] -> [B, D, h, w]. No deeper stage runs."""
    if norm:
        return _head_input(trunk, x)
    stages = sorted(set(layers))
    options = {"stop_early": True, "intermediates_only": True, "output_fmt": "NCHW"}
    maps = trunk.forward_intermediates(x, indices=[stage - 1 for stage in stages], **options)  # [B, C, h, w] each
    outputs = dict(zip(stages, maps, strict=True))
    return torch.cat([outputs[layer] for layer in layers], dim=1)  # [B, D, h, w]


@torch.no_grad()
def stage_grid(trunk: Any, image_size: int, layers: Sequence[int], norm: bool) -> tuple[int, int]:
    """Return (h, w) of the maps. It is measured by a pass on the meta device, because many networks lose border pixels, or round up.

    Raises:
        ValueError: for a network that cannot run on this input size or gives no map; the message names the reason.
    """
    tensors = [*trunk.parameters(), *trunk.buffers()]
    shell = copy.deepcopy(trunk, {id(tensor): tensor.detach().to("meta") for tensor in tensors})  # takes no memory for weights
    try:
        try:
            _, _, height, width = stage_maps(shell, _blank(shell, image_size), layers, norm).shape  # [1, D, h, w]
        except (RuntimeError, NotImplementedError):  # a few networks look at numbers while they run
            _, _, height, width = stage_maps(trunk, _blank(trunk, image_size), layers, norm).shape  # [1, D, h, w]
    except Exception as error:  # networks raise any kind
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"timm's {type(trunk).__name__} gives no map of tokens for {image_size} pixels ({type(error).__name__}: {reason}); "
            "choose another image_size, layer or norm"
        ) from error
    return height, width


def _blank(trunk: Any, image_size: int) -> Tensor:
    parameter = next(trunk.parameters())
    return torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)  # [1, 3, S, S]


def _head_input(trunk: Any, x: Tensor) -> Tensor:
    """Return the map [B, C, h, w] of the last stage, as it enters the network's head."""
    maps = trunk.forward_features(x)  # [B, C, h, w] or [B, h, w, C]
    if maps.ndim != 4:
        raise ValueError(f"timm's {type(trunk).__name__} gives no map of features after its final norm; use norm=False")
    return maps.permute(0, 3, 1, 2) if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else maps  # [B, C, h, w]


def build(model: str, *, pretrained: bool, weights: str | None, **options: Any) -> TimmEncoder:
    """Return the encoder of "model[.tag][/file]", "hf-hub:org/model" or "local-dir:folder"."""
    model_name, file = split_weights(model)
    file = weights or file
    _check_name(model_name)
    loads_own = pretrained and file is None
    what = f"the weight file of {model_name}{_source(model_name)}"
    with explain_download(what) if loads_own else nullcontext():
        trunk = _from_hub(model_name) if loads_own else timm.create_model(model_name)
    if not callable(getattr(trunk, "reset_classifier", None)):
        raise ValueError(f"timm's {type(trunk).__name__} has no classifier to leave out, hence no pooled output that this backend knows")
    trunk.reset_classifier(0)  # not earlier, because timm does not load strictly with another number of classes
    encoder = TimmEncoder(trunk, **options)
    if pretrained and file is not None:
        quick = model_name.replace("_clip_", "_clip_quickgelu_")
        if quick != model_name and "." not in model_name and timm.is_model(quick):
            warn_of_activation(file, quick, f"timm:{model_name}.TAG")
        _load(trunk, model_name, file)
    return encoder


def _from_hub(model_name: str) -> Any:
    """Return a model with its own weights. If the hub does not answer, they are read from the cache."""
    scheme, colon, path = model_name.partition(":")
    config = None if colon else timm.get_pretrained_cfg(model_name, allow_unregistered=True)
    repository = path if scheme == "hf-hub" else config.hf_hub_id if config else None
    folder = cached_instead(repository) if repository else None
    if folder is None:
        return timm.create_model(model_name, pretrained=True)
    if config is None:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    return timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay={"file": first_file(folder, *names)})


def _check_name(model_name: str) -> None:
    """Raise a ValueError for a name that timm does not know. The message lists similar models, or the tags."""
    if ":" in model_name:
        return  # the model is on the hub or in a folder
    architecture, _, tag = model_name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {architecture!r}.{near_names(architecture, timm.list_models())}")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and model_name not in tagged:
        raise WeightsError(f"timm has no weights {tag!r} for {architecture}; it has: {', '.join(tagged) or 'none'}")


def _source(model_name: str) -> str:
    """Return a text for messages that names the place from which timm gets the weights of a model."""
    config = timm.get_pretrained_cfg(model_name, allow_unregistered=True) if ":" not in model_name else None
    if config and config.hf_hub_id:
        return f" (model.safetensors of {config.hf_hub_id} on the hub)"
    return f" ({config.url})" if config and config.url else ""


def _load(trunk: Any, model_name: str, file: str) -> None:
    """Load a local file. If its keys are not timm's (Meta's DINOv2, OpenAI's CLIP), timm's converter renames them."""
    state = _without_classifier(trunk, read_state(file))
    wanted = {key: value.shape for key, value in trunk.state_dict().items()}
    if {key: getattr(value, "shape", None) for key, value in state.items()} != wanted and (convert := _converter(model_name)):
        with refuse_misfit(file):
            state = convert(state, trunk)
    state = _without_classifier(trunk, without_prefix(state, wanted, file))
    load_strict(trunk, state, file)


def _converter(model_name: str) -> Any:
    """Return timm's converter from the authors' keys to timm's keys, or None if the architecture's module has no converter."""
    if ":" in model_name:
        return None
    module = timm.model_entrypoint(model_name.partition(".")[0]).__module__
    return getattr(sys.modules[module], "checkpoint_filter_fn", None)


def _without_classifier(trunk: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` without the classifier, which an encoder does not have."""
    declared = trunk.pretrained_cfg.get("classifier") or ()
    names = (declared,) if isinstance(declared, str) else declared
    left_out = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} - set(trunk.state_dict())
    return {key: value for key, value in state.items() if key not in left_out}
