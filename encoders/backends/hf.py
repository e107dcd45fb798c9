"""This backend builds vision transformers of transformers (CLIP, SigLIP, DINOv3, MAE, C-RADIO, ...), by hub id or local folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from open_clip.tokenizer import canonicalize_text
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, AutoVideoProcessor, PretrainedConfig

from encoders.backends.blocks import BlockEncoder
from encoders.images.resizing import Interpolation
from encoders.weight_files import (
    INSTEAD_OF_FOLDER,
    INSTEAD_OF_TOKENIZER,
    WeightsError,
    explain_download,
    hub_answers,
    read_state,
    refuse_misfit,
)

# Shapes: B, S, h, w, D, E, T as in base.py; L = prefix tokens (class, registers) + h*w.

# Image processors store the numbers of Pillow's filters.
FILTERS: dict[int, Interpolation] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Family:
    """A family names the parts of an architecture in transformers, as dotted module names."""

    model: str
    """Name of the class in transformers."""
    blocks: str
    """List of transformer blocks, inside the tower."""
    norm: str
    """Final norm, inside the tower; "" without a final norm."""
    tower: str = ""
    """Vision transformer; "" if it is the model itself."""
    class_tokens: int = 1
    """The number of class tokens (and tokens of a teacher) before the patch tokens."""
    positions: bool = True
    """True if positions are interpolated only on request (`interpolate_pos_encoding`)."""
    image_head: str = ""
    """Projection from the pooled output to the joint embedding; "" without a projection."""
    text: str = ""
    """Text tower; "" without a text tower."""
    text_head: str = ""
    """Projection from the text tower's pooled output to the joint embedding; "" without a projection."""
    masks: bool = False
    """True if the forward pass hides patches, as in the pre-training of MAE."""
    frames: bool = False
    """True if the model takes videos. It sees an image as a still video of the length of a single patch."""
    canonical: bool = False
    """True if the text tower was trained on lower-case texts without punctuation. A few of SigLIP's tokenizers do this to texts."""
    pooler: bool = False
    """True if the model has a layer after its class token, which classifiers are saved without."""
    unused: str | tuple[str, ...] = "classifier."
    """First part of the names of weights for another task. A checkpoint may hold them, but an encoder does not need them."""


CLIP_PARTS: dict[str, Any] = {"blocks": "encoder.layers", "norm": "post_layernorm"}
SIGLIP_PARTS: dict[str, Any] = {**CLIP_PARTS, "class_tokens": 0}
AIMV2_PARTS: dict[str, Any] = {"blocks": "encoder.layers", "norm": "rms_norm", "class_tokens": 0, "positions": False}
PROJECTED: dict[str, Any] = {
    "tower": "vision_model",
    "image_head": "visual_projection",
    "text": "text_model",
    "text_head": "text_projection",
}
DINOV2_PARTS: dict[str, Any] = {"blocks": "encoder.layer", "norm": "layernorm", "positions": False}

PREFIXES = ("num_register_tokens", "num_cls_tokens", "num_registers", "n_cls_tokens")
"""The numbers of tokens before the patches, beside a class token, in configs."""

# config.model_type -> family
FAMILIES = {
    "clip": Family("CLIPModel", **CLIP_PARTS, **PROJECTED),
    "clip_vision_model": Family("CLIPVisionModel", **CLIP_PARTS),
    "metaclip_2": Family("MetaClip2Model", **CLIP_PARTS, **PROJECTED),
    "metaclip_2_vision_model": Family("MetaClip2VisionModel", **CLIP_PARTS),
    "aimv2": Family("Aimv2Model", **AIMV2_PARTS, **PROJECTED),
    "aimv2_vision_model": Family("Aimv2VisionModel", **AIMV2_PARTS),
    "siglip": Family("SiglipModel", **SIGLIP_PARTS, tower="vision_model", text="text_model", canonical=True),
    "siglip_vision_model": Family("SiglipVisionModel", **SIGLIP_PARTS),
    "dinov2": Family("Dinov2Model", **DINOV2_PARTS),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", **DINOV2_PARTS),
    "dinov3_vit": Family("DINOv3ViTModel", blocks="model.layer", norm="norm", positions=False),
    "tipsv2": Family("Tipsv2Model", **DINOV2_PARTS, tower="vision_model", text="text_model"),
    "tipsv2_vision_model": Family("Tipsv2VisionModel", **DINOV2_PARTS),
    "radio": Family("RadioModel", blocks="encoder.layer", norm="", class_tokens=0, positions=False),
    "pixio": Family("PixioModel", blocks="layers", norm="layernorm", class_tokens=0, positions=False),
    "ijepa": Family("IJepaModel", blocks="layers", norm="layernorm", class_tokens=0),
    "vjepa2": Family("VJEPA2Model", blocks="layer", norm="layernorm", tower="encoder", class_tokens=0, positions=False, frames=True),
    "vit": Family("ViTModel", blocks="layers", norm="layernorm", pooler=True),
    "vit_msn": Family("ViTMSNModel", blocks="layers", norm="layernorm"),
    "deit": Family(
        "DeiTModel",
        blocks="layers",
        norm="layernorm",
        class_tokens=2,
        pooler=True,
        unused=("cls_classifier.", "distillation_classifier."),
    ),
    "mlcd_vision_model": Family("MLCDVisionModel", **CLIP_PARTS, positions=False),
    "vit_mae": Family("ViTMAEModel", blocks="layers", norm="layernorm", masks=True, unused="decoder."),
}


NAFLEX = (
    "its NaFlex form takes images of any aspect ratio, and encoders take squares: name a SigLIP 2 of a fixed size, such as "
    "hf:google/siglip2-base-patch16-256, or timm:naflexvit_base_patch16_siglip.v2_webli, which gives NaFlex squares"
)
ADVICE = {"siglip2": NAFLEX, "siglip2_vision_model": NAFLEX, "timm_wrapper": "name it timm:hf-hub:ORGANISATION/MODEL"}
"""config.model_type of models of another backend or form -> the remedy."""


class HFEncoder(BlockEncoder):
    """HFEncoder is a model of transformers. `embed_image` is its pooled output (class token or attention pool), projected for CLIP."""

    def __init__(self, model: nn.Module, source: str, processor: Any, **options: Any) -> None:
        config: Any = model.config
        family = FAMILIES[config.model_type]
        vision = getattr(config, "vision_config", config)
        head: Any = model.get_submodule(family.image_head) if family.image_head else None
        self.has_text = bool(family.text)  # set first, because the default layer depends on it
        super().__init__(
            model,
            width=vision.hidden_size,
            depth=vision.num_hidden_layers,
            patch_size=vision.patch_size,
            embed_dim=_embed_dim(head, vision),
            image_size=vision.crop_size if family.frames else vision.image_size,
            mean=processor.image_mean if processor.do_normalize else (0.0, 0.0, 0.0),  # C-RADIO normalises inside
            std=processor.image_std if processor.do_normalize else (1.0, 1.0, 1.0),
            interpolation=FILTERS[int(processor.resample)],
            **_fit(processor, source),
            **options,
        )
        self.prefix_tokens = family.class_tokens + sum(getattr(vision, name, 0) for name in PREFIXES)
        if self.norm and not family.norm:
            raise ValueError(f"{source} has no final norm, use norm=False")
        # AIMv2 has sizes with and without interpolation, and V-JEPA 2 counts places on the grid of its training
        self.flexible = getattr(vision, "is_native", True) and not family.frames
        self.family, self.source = family, source
        self._tokenizer: Any = None  # read on first use
        self.watch_blocks()

    @property
    def _vision(self) -> Any:
        return self.tower.get_submodule(self.family.tower)

    def blocks_and_norm(self) -> tuple[nn.ModuleList, nn.Module]:
        norm = self._vision.get_submodule(self.family.norm) if self.family.norm else nn.Identity()
        return self._vision.get_submodule(self.family.blocks), norm

    def _run(self, tower: nn.Module, x: Tensor) -> Any:
        options: dict[str, Any] = {"interpolate_pos_encoding": True} if self.family.positions else {}
        if self.family.masks:  # ascending noise keeps the patches in order, and a mask_ratio of 0 keeps all of them
            options["noise"] = torch.arange(self.grid[0] * self.grid[1], device=x.device).expand(len(x), -1)  # [B, h*w]
        if self.family.frames:
            x = x.unsqueeze(1).expand(-1, self.tower.config.tubelet_size, -1, -1, -1)  # [B, frames, 3, S, S]
        return tower(x, **options)

    def image_embedding(self, x: Tensor) -> Tensor:
        output = self._run(self._vision, x)
        if "summary" in output:  # C-RADIO's class tokens side by side
            return output.summary
        # MAE has no pooling, so its class token after the final norm is used; I-JEPA has no class token either.
        last = output.last_hidden_state  # [B, L, D]
        alone = last[:, 0] if self.family.class_tokens else last.mean(dim=1)  # [B, D]
        pooled = output.pooler_output if "pooler_output" in output else alone  # [B, D]
        return self.tower.get_submodule(self.family.image_head)(pooled) if self.family.image_head else pooled  # [B, E]

    def text_embedding(self, texts: list[str]) -> Tensor:
        if self._tokenizer is None:
            with explain_download(f"the tokenizer of {self.source}", otherwise=INSTEAD_OF_TOKENIZER):
                self._tokenizer = AutoTokenizer.from_pretrained(
                    self.source, local_files_only=_only_local(self.source), trust_remote_code=False
                )
        length = self.tower.config.text_config.max_position_embeddings
        texts = [canonicalize_text(text) for text in texts] if self.family.canonical else texts
        # SigLIP was trained with texts padded to the full length. CLIP masks the padding.
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(next(self.tower.parameters()).device)
        pooled = self.tower.get_submodule(self.family.text)(**tokens).pooler_output  # [T, D]
        return self.tower.get_submodule(self.family.text_head)(pooled) if self.family.text_head else pooled  # [T, E]


def _embed_dim(head: Any, vision: Any) -> int | None:
    """Return the width of an image's embedding, or None for an AIMv2 tower without attention pooling."""
    if head is not None:
        return head.out_features
    if (tokens := getattr(vision, "summary_idxs", None)) is not None:
        return vision.hidden_size * len(tokens)
    return vision.hidden_size if getattr(vision, "use_head", True) else None


def _fit(processor: Any, source: str) -> dict[str, Any]:
    """Return the arguments with which `to_pixels` does the work of an image processor. transformers rounds half a pixel down."""
    size = {key: value for key, value in dict(processor.size or {}).items() if value}
    crop = {key: value for key, value in dict(processor.crop_size or {}).items() if value} if processor.do_center_crop else {}
    side, cuts = next(iter(size.values()), 0), set(crop.values()) or set(size.values())
    squash = set(size) == {"height", "width"} and size["height"] == size["width"]
    if not (processor.do_resize and len(cuts) == 1 and max(cuts) <= side and (squash or (set(size) == {"shortest_edge"} and crop))):
        raise ValueError(f"the image processor of {source} makes no square of one size: size {size}, crop {crop or None}")
    crop_pct = max(cuts) / side
    while math.floor(max(cuts) / crop_pct) < side:  # a quotient rounded up would lose a pixel
        crop_pct = math.nextafter(crop_pct, 0)
    return {"fit": "squash" if squash else "crop", "crop_pct": crop_pct, "centre": "floor"}


def build(model: str, *, config: Mapping[str, Any] | None = None, **options: Any) -> HFEncoder:
    """Return the encoder of a hub id or a local folder, or the encoder that `config` describes. The keywords are as in `build_encoder`."""
    if config is None:
        return _build(model, **options)
    with TemporaryDirectory() as folder:
        for file, part in {"config.json": "model", "preprocessor_config.json": "processor"}.items():
            Path(folder, file).write_text(json.dumps(config[part]))
        return _build(folder, **options)


def _build(model: str, *, pretrained: bool, weights: str | None, **options: Any) -> HFEncoder:
    with explain_download(f"config.json of {model}", otherwise=INSTEAD_OF_FOLDER):
        local = _only_local(model)
        config = AutoConfig.from_pretrained(model, local_files_only=local, trust_remote_code=False)
    if (family := FAMILIES.get(config.model_type)) is None:
        advice = ADVICE.get(config.model_type, "the timm backend takes more networks, see timm.list_models()")
        raise ValueError(f"{model} is a {config.model_type!r} model; the hf backend takes {', '.join(FAMILIES)}; {advice}")
    with explain_download(f"preprocessor_config.json of {model}", otherwise=INSTEAD_OF_FOLDER):
        reader = AutoVideoProcessor if family.frames else AutoImageProcessor
        processor = reader.from_pretrained(model, local_files_only=local, trust_remote_code=False)
    if family.masks:
        config.mask_ratio = 0.0  # an encoder sees the whole image
    kind = getattr(transformers, family.model)
    classifier = any("ForImageClassification" in name for name in config.architectures or [])
    parts = {"add_pooling_layer": False} if family.pooler and classifier else {}
    tower = _create(kind, model, config, weights, local, parts) if pretrained else kind(config, **parts)
    return HFEncoder(tower, model, processor, **options)


def _only_local(model: str) -> bool:
    """Return whether files are read only from a local folder or from the cache."""
    return Path(model).is_dir() or not hub_answers()


def _create(kind: Any, model: str, config: PretrainedConfig, weights: str | None, local: bool, parts: Mapping[str, Any]) -> nn.Module:
    """Return the model of class `kind`, with its weights in float32. A missing or unexpected key raises a WeightsError.

    Args:
        parts: arguments of the class that say which parts it has.
    """
    # A local file is also loaded by from_pretrained, which knows the keys of every earlier version of transformers.
    options = {"config": config, "dtype": torch.float32, "output_loading_info": True, **parts}
    if weights is not None:
        state = read_state(weights)
        with refuse_misfit(weights):
            created, report = kind.from_pretrained(None, state_dict=state, **options)
    else:
        with explain_download(f"the weight file of {model}"):
            created, report = kind.from_pretrained(model, local_files_only=local, **options)
    unused = FAMILIES[config.model_type].unused
    faults = {fault: sorted(key for key in map(str, keys) if not key.startswith(unused)) for fault, keys in report.items()}
    faults = {fault: keys for fault, keys in faults.items() if keys}
    if faults:
        raise WeightsError(f"the weights of {weights or model} do not fit {kind.__name__}: {faults}")
    return created
