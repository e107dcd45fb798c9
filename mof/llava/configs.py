"""What published checkpoints say about themselves: config.json, image processor, generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from encoders.images.resizing import Fit

LLAVA_TYPES = ("llava", "llava_llama")
"""model_type of original LLaVA checkpoints on Llama."""

LLAVA_KEYS = (
    "mm_",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "freeze_mm_mlp_adapter",
    "tune_mm_",
    "unfreeze_mm_",
    "use_mm_proj",
    "tokenizer_",
    "model_type",
    "architectures",
    "transformers_version",
    "_name_or_path",
)
"""How the entries of LLaVA's config.json begin that say nothing of the language model."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint. ValueError naming the file that is missing or unreadable."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: expected the folder of a checkpoint, with its config.json")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} should hold a JSON object, not {type(config).__name__}")
    return config


@dataclass(frozen=True)
class OriginalConfig:
    """What an original LLaVA checkpoint says besides its language model's config."""

    vision_tower: str
    """A hub id, or a path on the machine where it was trained."""
    layer: int
    projector: str | None
    """None where nothing is said."""
    fit: Fit
    wraps_images: bool
    """Whether prompts put <im_start> and <im_end> around images."""
    text: PretrainedConfig
    dino_statistics: str
    """What DINOv2's pixels are normalised by: "clip" as in the released code, or "own" (this library's addition)."""


def read_llava_config(folder: Path) -> OriginalConfig:
    """Of an original LLaVA or a released MoF checkpoint.

    Raises:
        ValueError: for a checkpoint that is none, or of a kind whose images are cut up or whose class tokens are used.
    """
    config, file = read_config(folder), folder / "config.json"
    if config.get("model_type") not in LLAVA_TYPES or "mm_vision_tower" not in config:
        raise ValueError(
            f"{file}: model_type {config.get('model_type')!r} with mm_vision_tower {config.get('mm_vision_tower')!r} is no checkpoint "
            f"that is known here; expected one of {', '.join(LLAVA_TYPES)} with mm_vision_tower (original LLaVA-1.5, released MoF), "
            "llava with vision_config and text_config (Hugging Face), or mof (this library's own)"
        )
    aspect, feature = config.get("image_aspect_ratio"), config.get("mm_vision_select_feature", "patch")
    fits: dict[str | None, Fit] = {"pad": "pad", "square": "crop", None: "crop"}
    if aspect not in fits:
        raise ValueError(f"{file}: image_aspect_ratio {aspect!r} cuts images up (LLaVA-1.6); expected 'pad' or 'square'")
    if feature != "patch":
        raise ValueError(f"{file}: mm_vision_select_feature {feature!r}; expected 'patch', since encoders give no class tokens")
    text = {key: value for key, value in config.items() if not key.startswith(LLAVA_KEYS)}
    return OriginalConfig(
        vision_tower=config["mm_vision_tower"],
        layer=config.get("mm_vision_select_layer", -2),
        projector=config.get("mm_projector_type"),
        fit=fits[aspect],
        wraps_images=bool(config.get("mm_use_im_start_end")),
        text=AutoConfig.for_model("llama", **text),
        dino_statistics=config.get("mm_dino_statistics", "clip"),
    )


def fit_of(processor: Any, image_size: int, source: object) -> Fit:
    """How an image processor of transformers makes images square.

    Raises:
        ValueError: for one whose result is not `image_size` pixels square, or that cuts off more than the long side's ends.
    """
    settings: Mapping[str, Any] = json.loads(processor.to_json_string())
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    cropped = settings.get("do_center_crop") and set(crop.values()) == {image_size} and size.get("shortest_edge") == image_size
    squashed = not settings.get("do_center_crop") and (size.get("height"), size.get("width")) == (image_size, image_size)
    if settings.get("do_pad") and (cropped or squashed):
        return "pad"
    if cropped or squashed:
        return "crop" if cropped else "squash"
    raise ValueError(
        f"{source}: the image processor's size {size} and crop_size {crop} do not give the {image_size} x {image_size} pixels that the "
        f"vision tower takes; expected shortest_edge and crop_size, or height and width, of {image_size}"
    )


def read_generation(folder: Path) -> GenerationConfig | None:
    """generation_config.json, without sampling settings that greedy decoding ignores: they may not be saved again."""
    if not (folder / "generation_config.json").is_file():
        return None
    config = GenerationConfig.from_pretrained(folder)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config
