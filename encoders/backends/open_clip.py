"""This backend builds CLIP-like models of open_clip: its own vision transformers and ResNets, and timm's networks in its CLIP classes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from encoders.backends import timm as timm_backend
from encoders.backends.blocks import BlockEncoder, Positions
from encoders.images.resizing import Fit
from encoders.names import near_names, split_weights
from encoders.weight_files import (
    INSTEAD_OF_TOKENIZER,
    WeightsError,
    cached_instead,
    explain_download,
    first_file,
    hub_answers,
    read_state,
    refuse_misfit,
    warn_of_activation,
    without_prefix,
)

# Shapes: B, S, h, w, D, E, T as in base.py; L = 1 + h*w.


SCALARS = ("input_resolution", "context_length", "vocab_size")
"""Numbers beside the weights in OpenAI's files."""
FITS: dict[str, Fit] = {"shortest": "crop", "squash": "squash", "longest": "pad"}  # open_clip's resize_mode


class OpenClipEncoder(BlockEncoder):
    """OpenClipEncoder is an image-text model of open_clip. `tower` is the whole model, and `tower.visual` is its vision tower."""

    has_text = True

    def __init__(self, model: nn.Module, model_name: str, *, offline: bool, norm: bool | None = None, **options: Any) -> None:
        visual: Any = model.visual
        preprocess = visual.preprocess_cfg
        size = visual.image_size
        super().__init__(
            model,
            **_sizes(visual, bool(norm)),
            image_size=size if isinstance(size, int) else size[0],
            mean=preprocess["mean"],
            std=preprocess["std"],
            interpolation=preprocess["interpolation"],
            fit=FITS[preprocess["resize_mode"]],
            embed_dim=open_clip.get_model_config(model_name)["embed_dim"],
            norm=norm,
            **options,
        )
        if self.norm and not _has_final_norm(visual):
            raise ValueError(f"{model_name} has no final norm for its patch tokens, use norm=False")
        transformer = isinstance(visual, VisionTransformer)
        wrapped = isinstance(visual, TimmModel)
        self.prefix_tokens = timm_backend.prefix_tokens(visual.trunk) if wrapped else int(transformer)
        self.flexible = timm_backend.takes_any_size(visual.trunk) if wrapped else transformer
        self.model_name = model_name
        self._positions = Positions()
        self._offline = offline
        self._tokenizer: Any = None  # made on first use, because some tokenizers come from the hub
        self.watch_blocks()

    def blocks_and_norm(self) -> tuple[nn.ModuleList, nn.Module] | None:
        visual = self.tower.visual
        if isinstance(visual, TimmModel):
            return timm_backend.blocks_and_norm(visual.trunk)
        return (visual.transformer.resblocks, visual.ln_post) if isinstance(visual, VisionTransformer) else None

    def stage_tokens(self, x: Tensor) -> Tensor:
        visual = self.tower.visual
        if isinstance(visual, TimmModel):
            return timm_backend.read_stages(visual.trunk, x, self.layers, self.norm)
        stages = sorted(set(self.layers))
        options = {"stop_early": True, "intermediates_only": True}
        maps = visual.forward_intermediates(x, indices=[stage - 1 for stage in stages], **options)["image_intermediates"]
        outputs = dict(zip(stages, maps, strict=True))  # [B, C, h, w] each
        return torch.cat([outputs[layer].flatten(2).transpose(1, 2) for layer in self.layers], dim=-1)  # [B, h*w, D]

    def image_embedding(self, x: Tensor) -> Tensor:
        return self.tower.encode_image(x)  # [B, E]

    def text_embedding(self, texts: list[str]) -> Tensor:
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self.model_name, self._offline)
        tokens = self._tokenizer(texts).to(next(self.tower.parameters()).device)  # [T, context length]
        return self.tower.encode_text(tokens)  # [T, E]

    def change_input_size(self, image_size: int) -> None:
        visual = self.tower.visual
        visual.image_size = (image_size, image_size)
        if isinstance(visual, TimmModel):
            timm_backend.resize(visual.trunk, image_size, self._positions)
            return
        grid = (image_size // self.patch_size,) * 2
        visual.positional_embedding = self._positions.resampled(visual.positional_embedding, visual.grid_size, grid, prefix=1)
        visual.grid_size = grid

    def measure_grid(self) -> tuple[int, int]:
        if self.blocks_and_norm() is None and isinstance(self.tower.visual, TimmModel):
            return timm_backend.stage_grid(self.tower.visual.trunk, self.image_size, self.layers, self.norm)
        return super().measure_grid()


def _sizes(visual: Any, norm: bool) -> dict[str, Any]:
    """Return the arguments width, patch_size (both by layer) and depth of `Encoder` for a vision tower."""
    if isinstance(visual, TimmModel):
        return timm_backend.sizes(visual.trunk, norm)
    if isinstance(visual, VisionTransformer):
        return {"width": visual.conv1.out_channels, "depth": len(visual.transformer.resblocks), "patch_size": visual.patch_size[0]}
    assert isinstance(visual, ModifiedResNet), type(visual)  # open_clip has no other towers
    widths = [visual.conv3.out_channels, *(2**stage * visual.layer1[-1].conv3.out_channels for stage in range(4))]
    strides = (4, 4, 8, 16, 32)  # strides of the stem and the four stages; the attention pooling fits a single grid
    return {"width": dict(enumerate(widths, 1)), "depth": 5, "patch_size": dict(enumerate(strides, 1))}


def _has_final_norm(visual: Any) -> bool:
    """Return whether a final norm fits the patch tokens. CoCa's norm comes after its attention pooling, and ResNets have no norm."""
    return isinstance(visual, TimmModel) or (isinstance(visual, VisionTransformer) and visual.attn_pool is None)


def _tokenizer(model_name: str, offline: bool) -> Any:
    """Return the tokenizer of a model. With `offline`, a tokenizer of the hub is read only from the cache."""
    config = open_clip.get_model_config(model_name)
    source = (config or {}).get("text_cfg", {}).get("hf_tokenizer_name")
    where = f" (tokenizer.json, tokenizer_config.json of {source} on the hub)" if source else ""
    local = source is None or model_name.startswith("local-dir:") or Path(source).is_dir()
    cached = bool(source) and (offline or not (local or hub_answers()))
    with explain_download(f"the tokenizer of {model_name}{where}", otherwise=INSTEAD_OF_TOKENIZER):
        return open_clip.get_tokenizer(model_name, **({"local_files_only": True} if cached else {}))


def build(model: str, *, pretrained: bool, weights: str | None, **options: Any) -> OpenClipEncoder:
    """Return the encoder of "model/tag", "model/file", "hf-hub:org/model" or "local-dir:folder"."""
    model_name, tag = split_weights(model)
    if ":" in model_name:
        clip = _create_external(model_name, weights, pretrained)
    else:
        clip = _create(model_name, tag, weights, pretrained)
    return OpenClipEncoder(clip, model_name, offline=not pretrained, **options)


def _create(model_name: str, tag: str | None, weights: str | None, pretrained: bool) -> nn.Module:
    """Return a model that open_clip knows, with the weights of the file `weights`, or else of `tag` (a tag of open_clip, or a file)."""
    if model_name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {model_name!r}.{near_names(model_name, open_clip.list_models())}")
    # The declaration of a tag also holds when the weights are random or come from another file.
    declared = open_clip.get_pretrained_cfg(model_name, tag or "")
    path = _locate(model_name, tag, weights, declared) if pretrained else None
    if path is not None and not declared and f"{model_name}-quickgelu" in open_clip.list_models():
        warn_of_activation(path, f"{model_name}-quickgelu", f"open_clip:{model_name}/TAG")
    # A file on the hub defines a few of the text towers, whatever their weights are.
    text = open_clip.get_model_config(model_name)["text_cfg"]
    if (source := text.get("hf_model_name")) is not None:
        with explain_download(f"config.json of {source}"):
            folder = cached_instead(source)  # without an answer from the hub, open_clip would ask for half a minute
        text |= {"hf_model_name": str(folder or source), "hf_model_pretrained": False}
    given = path is not None and (weights is not None or not declared)  # the user's file, which other code may have written
    with refuse_misfit(path) if path else explain_download(f"config.json of {source}"), _random_weights_are_meant():
        clip = open_clip.create_model(
            model_name,
            pretrained=None if given else path,  # None: random weights
            weights_only=True,
            pretrained_text=False,
            device=torch.empty(0).device,  # otherwise open_clip moves the model to the CPU; torch 2.6 has no other way to get this device
            force_quick_gelu=declared.get("quick_gelu", False),
            force_preprocess_cfg={key: declared[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in declared},
            **({} if source is None else {"text_cfg": text}),
        )
    if path is not None and given:
        _load(clip, path)
    return clip


def _load(clip: Any, path: str) -> None:
    """Load a user's file: weights of open_clip or OpenAI, also as training code saves them, such as repaired CLIPs (DIVA, un2CLIP).

    Raises:
        WeightsError: for a file that cannot be read or does not fit.
    """
    if Path(path).suffix in (".npz", ".npy"):  # Google's own files of SigLIP
        with refuse_misfit(path):
            open_clip.load_checkpoint(clip, path)
        return
    state = without_prefix(read_state(path), [name for name in clip.state_dict() if name.startswith("visual.")], path)
    with refuse_misfit(path):
        state = convert_state_dict(clip, {name: value for name, value in state.items() if name not in SCALARS})
        if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        for name in ("logit_scale", "logit_bias"):
            if name in state and getattr(clip, name, None) is not None:
                state[name] = state[name].reshape(getattr(clip, name).shape)
        resize_pos_embed(state, clip)
        clip.load_state_dict(state, strict=True)


def _create_external(model_name: str, weights: str | None, pretrained: bool) -> nn.Module:
    """Return a model whose config is on the hub or in a folder. Its weights are at the same place, unless `weights` names a file."""
    loads_weights = pretrained and weights is None
    options = {"pretrained_text": False, "device": torch.empty(0).device}
    what = f"{model_name} (open_clip_config.json, open_clip_model.safetensors)"
    with explain_download(what), _random_weights_are_meant():
        scheme, _, repository = model_name.partition(":")
        folder = cached_instead(repository) if scheme == "hf-hub" else None
        name = model_name if folder is None else f"local-dir:{folder}"
        clip = open_clip.create_model(name, load_weights=loads_weights, require_pretrained=loads_weights, **options)
    if pretrained and weights is not None:
        _load(clip, weights)
    return clip


@contextmanager
def _random_weights_are_meant() -> Iterator[None]:
    """Keep back open_clip's warning of random weights. The caller asked for random weights, or loads others into the model afterwards."""
    root = logging.getLogger()  # open_clip writes to the root logger

    def is_other(record: logging.LogRecord) -> bool:
        return "Model initialized randomly" not in record.getMessage()

    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)


def _locate(model_name: str, tag: str | None, weights: str | None, declared: dict[str, Any]) -> str:
    """Return the path of the weight file, which is downloaded if necessary."""
    if weights is None and declared:
        repository, _, file = declared.get("hf_hub", "").rpartition("/")
        file = file or HF_WEIGHTS_NAME
        where = f" ({file} of {repository} on the hub)" if repository else ""
        with explain_download(f"the weight file of {model_name}/{tag}{where}"):
            folder = cached_instead(repository) if repository else None
            if folder is None:
                return open_clip.download_pretrained(declared)
            return first_file(folder, HF_SAFE_WEIGHTS_NAME if file == HF_WEIGHTS_NAME else f"{Path(file).stem}.safetensors", file)
    source = weights or tag
    if source is not None and Path(source).is_file():
        return source
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    raise WeightsError(
        f"{source!r} is neither a file nor a tag of open_clip for {model_name}.{near_names(source or '', tags)} "
        f"These are {', '.join(tags) or 'none'}; or give weights=PATH, or pretrained=False for random weights"
    )
