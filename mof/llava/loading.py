"""Published checkpoints in: original LLaVA-1.5, the released MoF models, Hugging Face LLaVA, LoRA on top of these."""

from __future__ import annotations

import logging
import os
from collections import ChainMap
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from encoders.weight_files import explain_download, read_state
from mof.data.records import IMAGE_PLACEHOLDER
from mof.llava.assembly import Ingredients, Loaded, assemble, choose_template
from mof.llava.configs import OriginalConfig, read_config, read_generation, read_llava_config
from mof.llava.hf import read_hf_llava
from mof.llava.keys import (
    CLIP,
    DINO,
    MOF,
    Parts,
    choose_layout,
    full_projector_names,
    projector,
    refuse_equal_projectors,
    tower,
)
from mof.llava.lora_folders import is_lora, merge_lora, trained_beside_lora
from mof.llava.towers import Tower, build_dino_tower, build_vision_tower
from mof.llava.weight_shards import has_weights, open_weights
from mof.model import MoFForConditionalGeneration

logger = logging.getLogger(__name__)

STAGE_1 = "mm_projector.bin"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
Folder = str | os.PathLike[str]


def load_checkpoint(
    folder: Folder,
    *,
    base: Folder | None = None,
    layout: str | None = None,
    vision_tower: Tower | None = None,
    dino_tower: Tower | None = None,
    released_preprocessing: bool | None = None,
) -> Loaded:
    """A model and its processor from a checkpoint folder of any layout that is known.

    Args:
        folder: original LLaVA-1.5 (whole; or `mm_projector.bin` of stage 1, or LoRA, with `base`), released MoF, Hugging Face
            LLaVA, this library's own (also as LoRA, with `base`).
        base: folder of what a stage-1 or LoRA folder was trained on.
        layout: "llava" or "released-mof", to say how many encoders are expected; by default the keys say.
        vision_tower: the CLIP or SigLIP that the checkpoint refers to: a local folder, a name for `build_encoder`, or an
            encoder. If the checkpoint holds its weights, the folder's config.json is all that is used.
        dino_tower: the DINOv2: a file with torch.hub's weights, a name for `build_encoder`, or an encoder.
        released_preprocessing: give DINOv2 pixels that are normalised for CLIP, as the released MoF code did; False gives it
            its own. None is what the checkpoint says, else True.

    Raises:
        ValueError: (mostly WeightsError) naming the file or the keys that are missing, unexpected, misshapen or ambiguous.
    """
    folder, base = Path(folder), None if base is None else Path(base)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: expected the folder of a checkpoint")
    lora = is_lora(folder)
    if lora and base is None:
        raise ValueError(
            f"{folder} holds a LoRA adapter: give the folder of the model that it was trained on, base=FOLDER or --base FOLDER"
        )
    config = read_config(base if lora and not (folder / "config.json").is_file() else folder)  # type: ignore[arg-type]
    if config.get("model_type") == "mof":
        return _load_own(folder, base if lora else None)
    if "vision_config" in config and "text_config" in config:
        return assemble(read_hf_llava(folder, vision_tower))
    released = read_llava_config(folder)
    loaded = assemble(_read_original(folder, base, released, layout, vision_tower, dino_tower, released_preprocessing))
    if lora:
        loaded.model.language_model = merge_lora(loaded.model.language_model, folder)
    return loaded


def _load_own(folder: Path, base: Path | None) -> Loaded:
    """A folder of this library, or a LoRA adapter on top of one."""
    model = MoFForConditionalGeneration.from_pretrained(base or folder)
    if base is not None:
        model = merge_lora(model, folder)
    processor = AutoProcessor.from_pretrained(base or folder)
    return Loaded(model.eval(), processor, "mof", len(open_weights(base or folder)))


def _read_original(
    folder: Path,
    base: Path | None,
    config: OriginalConfig,
    layout: str | None,
    vision_tower: Tower | None,
    dino_tower: Tower | None,
    released_preprocessing: bool | None,
) -> Ingredients:
    """Original LLaVA with one encoder, or the released MoF with two."""
    weights = _weights_of(folder, base)
    chosen = choose_layout(list(weights), layout, dino_tower is not None, folder)
    parts = chosen.sort(weights, folder)
    clip_state = parts.tensors(tower(CLIP), weights)
    encoders = {CLIP: build_vision_tower(config.vision_tower, vision_tower, clip_state, config.layer, chosen.place(tower(CLIP), folder))}
    kind = config.projector or _kind_of(parts)
    if chosen is MOF:
        projectors = {name: parts.tensors(projector(name), weights) for name in chosen.encoders}
        refuse_equal_projectors(projectors, folder)
        options: dict[str, Any] = {"image_size": encoders[CLIP].image_size}
        if config.dino_statistics == "clip" if released_preprocessing is None else released_preprocessing:
            options |= {"mean": encoders[CLIP].mean, "std": encoders[CLIP].std}
            logger.warning(
                "DINOv2 is given pixels normalised for CLIP, as in the released MoF code that this checkpoint was trained with; "
                "released_preprocessing=False (--own-preprocessing) normalises them for DINOv2"
            )
        width = projectors[DINO][min(name for name in projectors[DINO] if name.endswith("weight"))].shape[-1]  # shards have no order
        state = parts.tensors(tower(DINO), weights)
        encoders[DINO] = build_dino_tower(dino_tower, state, width, options, chosen.place(tower(DINO), folder))
    tokenizer = _read_tokenizer(folder, base, config.text)
    template = choose_template(tokenizer.chat_template, tokenizer)
    if template != tokenizer.chat_template:
        template = template.replace(IMAGE_PLACEHOLDER, _image_in_prompt(config, tokenizer))
    generation = read_generation(folder)
    return Ingredients(folder, parts, weights, config.text, encoders, kind, tokenizer, template, config.fit, generation)


def _weights_of(folder: Path, base: Path | None) -> Mapping[str, Tensor]:
    """All weights of an original checkpoint by their full names, with those of stage 1 or beside a LoRA over the base's."""
    if is_lora(folder):
        assert base is not None
        return ChainMap(trained_beside_lora(folder), open_weights(base))  # type: ignore[arg-type]
    if has_weights(folder):
        return open_weights(folder)
    if not (folder / STAGE_1).is_file():
        return open_weights(folder)  # says what is missing
    state = read_state(folder / STAGE_1)
    names = full_projector_names(state, folder / STAGE_1)
    if base is None:
        raise ValueError(f"{folder} holds the projectors of stage 1 only: give the language model's folder, base=FOLDER or --base FOLDER")
    return ChainMap({name: state[key] for name, key in names.items()}, open_weights(base))  # type: ignore[arg-type]


def _image_in_prompt(config: OriginalConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """What LLaVA's code makes of an image in a prompt.

    It tokenizes the texts around images one by one, so where a tokenizer puts a space before every text, one follows the image.
    """
    if config.wraps_images:
        return f"<im_start>{IMAGE_PLACEHOLDER}<im_end>"
    end = tokenizer.eos_token or ""
    alone, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", f"{end}\n"))
    return IMAGE_PLACEHOLDER if alone == after[-len(alone) :] else f"{IMAGE_PLACEHOLDER} "


def _kind_of(parts: Parts) -> str:
    """The kind of the projectors, from their keys, where the config does not say."""
    linears = sum(name.endswith("weight") for name in parts.names[projector(CLIP)])
    return "linear" if "weight" in parts.names[projector(CLIP)] else f"mlp{linears}x_gelu"


def _read_tokenizer(folder: Path, base: Path | None, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, or of its base."""
    homes = [place for place in (folder, base) if place is not None and any((place / name).is_file() for name in TOKENIZER)]
    if not homes:
        raise ValueError(f"no tokenizer in {folder}{f' or its base {base}' if base else ''}: expected one of {', '.join(TOKENIZER)}")
    model = homes[0] / "tokenizer.model"
    if model.is_file() and not (homes[0] / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise ValueError(f"reading {model} needs the package sentencepiece: pip install 'mof-vig[llava]'")
    with explain_download(f"the tokenizer of {homes[0]}"):
        return AutoTokenizer.from_pretrained(homes[0], config=config)
