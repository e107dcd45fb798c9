"""save_original writes models in the layouts of LLaVA's code and of the released MoF code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PretrainedConfig

from encoders import Encoder
from encoders.backends.hf import HFEncoder
from encoders.backends.torch_hub import TorchHubEncoder
from mof.data.records import IMAGE_PLACEHOLDER
from mof.llava.keys import CLIP, DINO, LANGUAGE_MODEL, Layout, projector, tower
from mof.llava.tower_export import as_torch_hub, as_vision_model, refuse_pooled, refuse_tiles
from mof.llava.towers import VISION

if TYPE_CHECKING:
    from mof.model import MoFForConditionalGeneration
    from mof.processor import MoFProcessor

OPENAI = {
    (1024, 14, 336): "openai/clip-vit-large-patch14-336",
    (1024, 14, 224): "openai/clip-vit-large-patch14",
    (768, 16, 224): "openai/clip-vit-base-patch16",
    (768, 32, 224): "openai/clip-vit-base-patch32",
}
"""(width, patch size, image size) -> hub id, for the CLIP models that LLaVA's code knows by name."""


def save_original(model: MoFForConditionalGeneration, processor: MoFProcessor, folder: Path, layout: Layout) -> None:
    """Write `model` in the layout of LLaVA's code (one encoder) or of the released MoF code (CLIP, then DINOv2).

    An encoder to which the model only refers stays a reference if the layout can name it; the weights of others are written. These
    layouts have no embedding of the image token, so its row is left out if it is the last.

    Raises:
        ValueError: for a model that the layout cannot hold.
    """
    mixer = model.mixer
    if len(mixer.encoders) != len(layout.encoders) or mixer.fusion != "interleaved" or model.language_model.config.model_type != "llama":
        raise ValueError(
            f"layout {layout.name} holds {len(layout.encoders)} interleaved encoder(s) before a Llama; this model has "
            f"{', '.join(mixer.encoders)}, fusion {mixer.fusion}, before a {model.language_model.config.model_type!r}"
        )
    refuse_pooled(mixer)
    refuse_tiles(processor.image_processor)
    encoders = dict(zip(layout.encoders, mixer.encoders.values(), strict=True))
    config = _config(model, processor, encoders)
    state: dict[str, Tensor] = {}
    for part, weights in _parts(model, encoders).items():
        state |= {layout.key(part, own): value for own, value in weights.items()}
    save_torch_state_dict(state, folder)
    processor.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = model.generation_config.to_diff_dict() | {"suppress_tokens": None}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")


def _parts(model: MoFForConditionalGeneration, encoders: dict[str, Encoder]) -> dict[str, dict[str, Tensor]]:
    """Return part of the layout -> name in the part -> weight."""
    llm, rows = model.language_model.state_dict(), _rows(model)
    if model.language_model.config.tie_word_embeddings:
        del llm["lm_head.weight"]
    for key in {"model.embed_tokens.weight", "lm_head.weight"} & llm.keys():
        llm[key] = llm[key][:rows].clone()  # a view of a larger storage cannot be saved
    parts, mixer = {LANGUAGE_MODEL: llm}, cast(Any, model.mixer)
    for name, adapter in zip(encoders, mixer.adapters.values(), strict=True):
        parts[projector(name)] = adapter.state_dict()
    if model.config.embed_encoders or not isinstance(encoders[CLIP], HFEncoder):
        _, vision = as_vision_model(encoders[CLIP])
        parts[tower(CLIP)] = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in vision.items()}
    if DINO in encoders and (model.config.embed_encoders or not isinstance(encoders[DINO], TorchHubEncoder)):
        parts[tower(DINO)] = as_torch_hub(encoders[DINO])
    return parts


def _rows(model: MoFForConditionalGeneration) -> int:
    """Return the size of the vocabulary, without the image token if it comes last."""
    rows = len(cast(Any, model.get_input_embeddings()).weight)
    return rows - 1 if model.config.image_token_id == rows - 1 else rows


def _config(model: MoFForConditionalGeneration, processor: MoFProcessor, encoders: dict[str, Encoder]) -> dict[str, Any]:
    """Return the content of config.json, with the entries from which LLaVA's code builds the parts around the language model."""
    text = model.language_model.config
    aspects = {"pad": "pad", "crop": "square"}
    if not isinstance(encoders[CLIP].layer, int):
        raise ValueError(f"layers {encoders[CLIP].layer} side by side: LLaVA's code reads one layer")
    if processor.image_processor.fit not in aspects:
        raise ValueError(f"images are fitted by {processor.image_processor.fit!r}; LLaVA's code knows 'pad' and 'crop'")
    clip = encoders[CLIP]
    config = {
        **text.to_diff_dict(),
        "rope_theta": text.rope_parameters["rope_theta"],  # older versions of transformers read it here
        "vocab_size": _rows(model),
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "mm_vision_tower": _name(clip),
        "mm_vision_select_layer": clip.layer,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": clip.width,
        "mm_projector_type": model.mixer.projector,
        "mm_use_im_start_end": f"<im_start>{IMAGE_PLACEHOLDER}<im_end>" in (processor.chat_template or ""),
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": aspects[processor.image_processor.fit],
    }
    if DINO in encoders:
        config["mm_dino_statistics"] = _dino_statistics(clip, encoders[DINO])
    return config


def _name(clip: Encoder) -> str:
    """Return the name by which LLaVA's code loads the vision tower."""
    label = clip.name.removeprefix("hf:")
    if isinstance(clip, HFEncoder) and label not in VISION:
        return label
    config: PretrainedConfig
    config, _ = as_vision_model(clip)
    name = OPENAI.get((config.hidden_size, config.patch_size, config.image_size))
    if name is None or config.hidden_act != "quick_gelu":
        raise ValueError(
            f"LLaVA's code builds CLIPs by their hub id, and {clip.name} is none of {', '.join(OPENAI.values())}; hf-llava can hold it"
        )
    return name


def _dino_statistics(clip: Encoder, dino: Encoder) -> str:
    """Return whose mean and std normalise DINOv2's pixels: "clip" or "own"."""
    if dino.image_size != clip.image_size:
        raise ValueError(
            f"the released layout has one image size, but CLIP looks at {clip.image_size} pixels and DINOv2 at {dino.image_size}"
        )
    if (dino.mean, dino.std) == (clip.mean, clip.std):
        return "clip"
    if (dino.mean, dino.std) == dino.declared_statistics:
        return "own"
    raise ValueError(f"DINOv2 is given mean {dino.mean} and std {dino.std}, neither CLIP's nor its own: the released layout cannot say so")
