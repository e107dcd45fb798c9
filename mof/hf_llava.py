"""Hugging Face's LlavaForConditionalGeneration, in."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoProcessor

from encoders.checkpoints import explain_download
from mof.checkpoint_assembly import Ingredients, choose_template
from mof.llava_configs import fit_of, read_config, read_generation
from mof.llava_keys import CLIP, HF_LLAVA, tower
from mof.llava_towers import Tower, embedded_vision_tower
from mof.records import IMAGE_PLACEHOLDER
from mof.weight_shards import open_weights


def read_hf_llava(folder: Path, vision_tower: Tower | None) -> Ingredients:
    """LlavaForConditionalGeneration of transformers."""
    if vision_tower is not None:
        raise ValueError(f"{folder} is a Hugging Face LLaVA, whose weights hold the vision tower: leave out vision_tower")
    if read_config(folder).get("model_type") != "llava":
        raise ValueError(f"{folder / 'config.json'}: model_type {read_config(folder).get('model_type')!r}; expected 'llava'")
    config = AutoConfig.from_pretrained(folder)
    with explain_download(f"the processor of {folder} (preprocessor_config.json, tokenizer files)"):
        processor = AutoProcessor.from_pretrained(folder)
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    if (vision.model_type, strategy) not in {("clip_vision_model", "default"), ("siglip_vision_model", "full")}:
        raise ValueError(
            f"{folder}: a {vision.model_type!r} with vision_feature_select_strategy {strategy!r} is not supported. Encoders give "
            "patch tokens: of CLIP, 'default' drops the class token ('full' would keep it); of SigLIP, which has none, 'full' keeps "
            "all patches ('default' would drop the first)"
        )
    token = processor.tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    if token != config.image_token_index:
        raise ValueError(
            f"{folder}: image_token_index is {config.image_token_index}, but {IMAGE_PLACEHOLDER} is {token} in its tokenizer; "
            "they must be the same token"
        )
    weights = open_weights(folder)
    parts = HF_LLAVA.sort(weights, folder)
    state = parts.tensors(tower(CLIP), weights)
    encoder = embedded_vision_tower(vision.model_type, vision, processor.image_processor, state, config.vision_feature_layer)
    fit = fit_of(processor.image_processor, vision.image_size, folder)
    template = choose_template(processor.chat_template, processor.tokenizer)
    kind = f"mlp2x_{config.projector_hidden_act}"
    generation = read_generation(folder)
    return Ingredients(folder, parts, weights, config.text_config, {CLIP: encoder}, kind, processor.tokenizer, template, fit, generation)
