"""read_original reads checkpoints of LLaVA-1.5 and of the released MoF: whole folders, and stage 1 or LoRA with the folder of a base."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from encoders import Encoder
from encoders.images.resizing import Fit
from encoders.weight_files import explain_download, read_state
from mof.data.records import IMAGE_PLACEHOLDER
from mof.llava.keys import CLIP, DINO, MOF, Parts, choose_layout, projector, refuse_equal_projectors, tower, with_full_names
from mof.llava.parts import Checkpoint, assemble, choose_template, read_config
from mof.llava.towers import Tower, build_dino_tower, build_vision_tower
from mof.llava.weights import has_weights, is_lora, open_weights

logger = logging.getLogger(__name__)

STAGE_1 = "mm_projector.bin"
BESIDE_LORA = "non_lora_trainables.bin"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

LLAVA_TYPES = ("llava", "llava_llama")
"""Values of model_type in original LLaVA checkpoints with Llama."""

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
"""Beginnings of the keys in LLaVA's config.json that do not belong to the language model."""


FITS: dict[str | None, Fit] = {"pad": "pad", "square": "crop", None: "crop"}
"""image_aspect_ratio in config.json -> the way in which images become square."""


def read_llava_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json in an original LLaVA or a released MoF checkpoint.

    Raises:
        ValueError: for another kind of checkpoint, or a LLaVA that cuts images into tiles or uses class tokens.
    """
    config, file = read_config(folder), folder / "config.json"
    if config.get("model_type") not in LLAVA_TYPES or "mm_vision_tower" not in config:
        raise ValueError(
            f"{file}: model_type {config.get('model_type')!r} with mm_vision_tower {config.get('mm_vision_tower')!r} is no checkpoint "
            f"that is known here; expected one of {', '.join(LLAVA_TYPES)} with mm_vision_tower (original LLaVA-1.5, released MoF), "
            "llava with vision_config and text_config (Hugging Face), or mof (this library's own)"
        )
    if (aspect := config.get("image_aspect_ratio")) not in FITS:
        raise ValueError(f"{file}: image_aspect_ratio {aspect!r} cuts images up (LLaVA-1.6); expected 'pad' or 'square'")
    if (feature := config.get("mm_vision_select_feature", "patch")) != "patch":
        raise ValueError(f"{file}: mm_vision_select_feature {feature!r}; expected 'patch', since encoders give no class tokens")
    return config


def read_original(
    folder: Path,
    base: Path | None,
    *,
    layout: str | None,
    vision_tower: Tower | None,
    dino_tower: Tower | None,
    released_preprocessing: bool | None,
) -> Checkpoint:
    """Return the parts of an original LLaVA (one encoder) or a released MoF (two encoders). `mof.llava.reading` explains the arguments."""
    config, weights = read_llava_config(folder), _read_weights(folder, base)
    chosen = choose_layout(list(weights), layout, dino_tower is not None, folder)
    parts = chosen.sort(weights, folder)
    state, place = parts.tensors[tower(CLIP)], parts.place(tower(CLIP))
    clip = build_vision_tower(config["mm_vision_tower"], vision_tower, state, config.get("mm_vision_select_layer", -2), place)
    encoders = {CLIP: clip}
    if chosen is MOF:
        # The released code always works as with "clip"; only this library writes "own".
        saved_for_clip = config.get("mm_dino_statistics", "clip") == "clip"
        for_clip = saved_for_clip if released_preprocessing is None else released_preprocessing
        encoders[DINO] = _read_dino(parts, dino_tower, clip, for_clip=for_clip)
    text = AutoConfig.for_model("llama", **{key: value for key, value in config.items() if not key.startswith(LLAVA_KEYS)})
    tokenizer = _read_tokenizer(folder, base, text)
    template = choose_template(tokenizer.chat_template, tokenizer)
    if template != tokenizer.chat_template:
        template = template.replace(IMAGE_PLACEHOLDER, _image_in_prompt(tokenizer, wrapped=bool(config.get("mm_use_im_start_end"))))
    return assemble(
        parts,
        text=text,
        encoders=encoders,
        projectors=config.get("mm_projector_type") or _kind_of(parts),
        tokenizer=tokenizer,
        template=template,
        fit=FITS[config.get("image_aspect_ratio")],
        lora=folder if is_lora(folder) else None,
    )


def _read_dino(parts: Parts, given: Tower | None, clip: Encoder, *, for_clip: bool) -> Encoder:
    """Return the DINOv2 of a released MoF checkpoint. With `for_clip`, its pixels are normalised for CLIP."""
    projectors = {name: parts.tensors[projector(name)] for name in parts.layout.encoders}
    refuse_equal_projectors(projectors, parts.source)
    options: dict[str, Any] = {"image_size": clip.image_size}
    if for_clip:
        options |= {"mean": clip.mean, "std": clip.std}
        logger.warning(
            "DINOv2 is given pixels normalised for CLIP, as in the released MoF code that this checkpoint was trained with; "
            "released_preprocessing=False (--own-preprocessing) normalises them for DINOv2"
        )
    width = projectors[DINO][min(name for name in projectors[DINO] if name.endswith("weight"))].shape[-1]  # shards have no order
    return build_dino_tower(given, parts.tensors[tower(DINO)], width, options, parts.place(tower(DINO)))


def _read_weights(folder: Path, base: Path | None) -> Mapping[str, Tensor]:
    """Return full name -> weight. For a folder of stage 1 or LoRA, its projectors replace the projectors of the base."""
    lora = is_lora(folder)
    file = folder / (BESIDE_LORA if lora else STAGE_1)
    if not lora and (has_weights(folder) or not file.is_file()):
        return open_weights(folder)  # this raises the error for a folder without weights
    state = read_state(file) if file.is_file() else {}  # a LoRA may have been trained without the projectors
    projectors = with_full_names(state, file)
    if base is None:
        raise ValueError(f"{folder} holds the projectors of stage 1 only: give the language model's folder, base=FOLDER or --base FOLDER")
    return open_weights(base) | projectors


def _image_in_prompt(tokenizer: PreTrainedTokenizerBase, *, wrapped: bool) -> str:
    """Return the text for an image in a prompt of LLaVA's code; if `wrapped`, between <im_start> and <im_end>.

    LLaVA's code tokenizes each text around an image alone. So a tokenizer that puts a space before each text puts it behind the image too.
    """
    if wrapped:
        return f"<im_start>{IMAGE_PLACEHOLDER}<im_end>"
    end = tokenizer.eos_token or ""
    alone, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", f"{end}\n"))
    return IMAGE_PLACEHOLDER if alone == after[-len(alone) :] else f"{IMAGE_PLACEHOLDER} "


def _kind_of(parts: Parts) -> str:
    """Return the kind of the projectors, derived from their keys, for a config that does not name it."""
    names = parts.tensors[projector(CLIP)]
    return "linear" if "weight" in names else f"mlp{sum(name.endswith('weight') for name in names)}x_gelu"


def _read_tokenizer(folder: Path, base: Path | None, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, or of its base."""
    homes = [place for place in (folder, base) if place is not None and any((place / name).is_file() for name in TOKENIZER)]
    if not homes:
        raise ValueError(f"no tokenizer in {folder}{f' or its base {base}' if base else ''}: expected one of {', '.join(TOKENIZER)}")
    model = homes[0] / "tokenizer.model"
    if model.is_file() and not (homes[0] / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise ValueError(f"reading {model} needs the package sentencepiece: pip install 'mof-vig[llava]'")
    with explain_download(f"the tokenizer of {homes[0]}"):
        return AutoTokenizer.from_pretrained(homes[0], config=config, trust_remote_code=False)
