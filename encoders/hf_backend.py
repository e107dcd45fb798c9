"""Vision transformers of transformers: CLIP, SigLIP, DINOv2, DINOv3, ViT, from a hub id or a local folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PretrainedConfig

from encoders.base import Encoder
from encoders.checkpoints import WeightsError, explain_download, read_state, refuse_misfit

# Shapes: B, S, h, w, D, E, T as in base.py; L = prefix tokens (class, registers) + h*w.

# torch's nearest to Pillow's filters, whose numbers image processors store: Lanczos (1), bilinear, bicubic.
FILTERS = {1: "bicubic", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Family:
    """Where an architecture of transformers keeps its parts, as dotted module names."""

    model: str
    """The class in transformers."""
    blocks: str
    """The list of transformer blocks, inside the tower."""
    norm: str
    """The final norm, inside the tower."""
    tower: str = ""
    """The vision transformer; "" when it is the model itself."""
    positions: bool = True
    """Whether positions are interpolated only when asked for (`interpolate_pos_encoding`)."""
    image_head: str = ""
    """The projection from the pooled output to the joint embedding; "" for none."""
    text: str = ""
    """The text tower; "" for none."""
    text_head: str = ""
    """The projection from the text tower's pooled output to the joint embedding; "" for none."""


CLIP_PARTS: dict[str, Any] = {"blocks": "encoder.layers", "norm": "post_layernorm"}
DINOV2_PARTS: dict[str, Any] = {"blocks": "encoder.layer", "norm": "layernorm", "positions": False}

# By config.model_type.
FAMILIES = {
    "clip": Family(
        "CLIPModel",
        **CLIP_PARTS,
        tower="vision_model",
        image_head="visual_projection",
        text="text_model",
        text_head="text_projection",
    ),
    "clip_vision_model": Family("CLIPVisionModel", **CLIP_PARTS),
    "siglip": Family("SiglipModel", **CLIP_PARTS, tower="vision_model", text="text_model"),
    "siglip_vision_model": Family("SiglipVisionModel", **CLIP_PARTS),
    "dinov2": Family("Dinov2Model", **DINOV2_PARTS),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", **DINOV2_PARTS),
    "dinov3_vit": Family("DINOv3ViTModel", blocks="model.layer", norm="norm", positions=False),
    "vit": Family("ViTModel", blocks="layers", norm="layernorm"),
}


class _Reached(Exception):
    """Carries the wanted block's output out of a forward pass whose rest is not needed."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden  # [B, L, D]


class HFEncoder(Encoder):
    """A model of transformers. `embed_image` is its pooled output, projected for CLIP (class token, attention pool)."""

    def __init__(self, model: nn.Module, source: str, processor: Any, **options: Any) -> None:
        config: Any = model.config
        family = FAMILIES[config.model_type]
        vision = config.vision_config if family.tower else config
        head: Any = model.get_submodule(family.image_head) if family.image_head else None
        super().__init__(
            model,
            width=vision.hidden_size,
            depth=vision.num_hidden_layers,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
            mean=processor.image_mean,
            std=processor.image_std,
            interpolation=FILTERS[int(processor.resample)],
            embed_dim=head.out_features if head else vision.hidden_size,
            flexible=True,
            has_text=bool(family.text),
            **options,
        )
        self.family, self.source = family, source
        self._tokenizer: Any = None  # read on first use

    def patch_tokens(self, x: Tensor) -> Tensor:
        tower = self.tower.get_submodule(self.family.tower)
        x = self._hidden(tower, x)  # [B, L, D]
        if self.norm:
            x = tower.get_submodule(self.family.norm)(x)
        return x[:, -self.grid[0] * self.grid[1] :]  # [B, h*w, D]: prefix tokens come first

    def _hidden(self, tower: nn.Module, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, L, D], by the tower's own forward pass, left as soon as the wanted block is done.

        Blocks differ in what they are called with (masks, rotary positions); the tower knows, and it runs all of them.
        """

        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Reached(output)

        def leave_before(_module: nn.Module, inputs: Any) -> None:
            raise _Reached(inputs[0])

        blocks: Any = tower.get_submodule(self.family.blocks)
        if self.blocks:
            hook = blocks[self.blocks - 1].register_forward_hook(leave)
        else:
            hook = blocks[0].register_forward_pre_hook(leave_before)
        try:
            self._run(tower, x)
        except _Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise AssertionError("the tower never ran the block")

    def _run(self, tower: nn.Module, x: Tensor) -> Any:
        return tower(x, interpolate_pos_encoding=True) if self.family.positions else tower(x)

    def image_embedding(self, x: Tensor) -> Tensor:
        pooled = self._run(self.tower.get_submodule(self.family.tower), x).pooler_output  # [B, D]
        return self.tower.get_submodule(self.family.image_head)(pooled) if self.family.image_head else pooled  # [B, E]

    def text_embedding(self, texts: list[str]) -> Tensor:
        if self._tokenizer is None:
            with explain_download(f"the tokenizer of {self.source}"):
                self._tokenizer = AutoTokenizer.from_pretrained(self.source)
        length = self.tower.config.text_config.max_position_embeddings
        # Padded to the full length because SigLIP was trained so; CLIP's masks make it the same either way.
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(next(self.tower.parameters()).device)
        pooled = self.tower.get_submodule(self.family.text)(**tokens).pooler_output  # [T, D]
        return self.tower.get_submodule(self.family.text_head)(pooled) if self.family.text_head else pooled  # [T, E]

    def change_input_size(self, image_size: int) -> None:
        """Nothing to change: these models interpolate their positions in every forward pass."""


def build(model: str, *, pretrained: bool, weights: str | None, **options: Any) -> HFEncoder:
    """The encoder of a hub id or a local folder; keywords of `build_encoder`."""
    with explain_download(f"config.json or preprocessor_config.json of {model}"):
        config = AutoConfig.from_pretrained(model)
        processor = AutoImageProcessor.from_pretrained(model)
    if config.model_type not in FAMILIES:
        raise ValueError(f"{model} is a {config.model_type!r} model; the hf backend takes {', '.join(FAMILIES)}")
    kind = getattr(transformers, FAMILIES[config.model_type].model)
    return HFEncoder(_create(kind, model, config, pretrained, weights), model, processor, **options)


def _create(kind: Any, model: str, config: PretrainedConfig, pretrained: bool, weights: str | None) -> nn.Module:
    """The model of class `kind` with its weights in float32, every key accounted for, or random ones."""
    if not pretrained:
        return kind(config)
    # Also a single file goes through from_pretrained, which knows the keys of every earlier version of transformers.
    options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    if weights is not None:
        state = read_state(weights)
        with refuse_misfit(weights):
            created, report = kind.from_pretrained(None, state_dict=state, **options)
    else:
        with explain_download(f"the weight file of {model}"):
            created, report = kind.from_pretrained(model, **options)
    faults = {fault: sorted(map(str, keys)) for fault, keys in report.items() if keys}
    if faults:
        raise WeightsError(f"the weights of {weights or model} do not fit {kind.__name__}: {faults}")
    return created
