"""These functions read and write Hugging Face's LlavaForConditionalGeneration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from encoders import Encoder
from encoders.backends.hf import FILTERS
from encoders.weight_files import explain_download, refuse_misfit
from mof.data.records import IMAGE_PLACEHOLDER
from mof.llava.keys import CLIP, HF_LLAVA, tower
from mof.llava.parts import Checkpoint, assemble, choose_template, read_config
from mof.llava.tower_export import as_vision_model, refuse_pooled, refuse_tiles
from mof.llava.towers import Tower, embedded_vision_tower
from mof.llava.weights import open_weights

if TYPE_CHECKING:
    from mof.model import MoFForConditionalGeneration
    from mof.processor import MoFProcessor


def read_hf_llava(folder: Path, vision_tower: Tower | None) -> Checkpoint:
    """Return the parts of a checkpoint of transformers' LlavaForConditionalGeneration."""
    if vision_tower is not None:
        raise ValueError(f"{folder} is a Hugging Face LLaVA, whose weights hold the vision tower: leave out vision_tower")
    if read_config(folder).get("model_type") != "llava":
        raise ValueError(f"{folder / 'config.json'}: model_type {read_config(folder).get('model_type')!r}; expected 'llava'")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with explain_download(f"the processor of {folder} (preprocessor_config.json, tokenizer files)"):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
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
    parts = HF_LLAVA.sort(open_weights(folder), folder)
    state, place = parts.tensors[tower(CLIP)], parts.place(tower(CLIP))
    encoder = embedded_vision_tower(vision.model_type, vision, processor.image_processor, state, config.vision_feature_layer, place)
    images, side = processor.image_processor, vision.image_size
    size = {key: length for key, length in dict(images.size).items() if length}
    if encoder.preprocessing.crop_pct != 1 or set(size.values()) != {side}:
        raise ValueError(
            f"{folder}: the image processor's size {size} and crop_size {images.crop_size} do not give the {side} x {side} "
            f"pixels that the vision tower takes; expected shortest_edge and crop_size, or height and width, of {side}"
        )
    return assemble(
        parts,
        text=config.text_config,
        encoders={CLIP: encoder},
        projectors=f"mlp2x_{config.projector_hidden_act}",
        tokenizer=processor.tokenizer,
        template=choose_template(processor.chat_template, processor.tokenizer),
        fit="pad" if images.to_dict().get("do_pad") else encoder.preprocessing.fit,
    )


def save_hf_llava(model: MoFForConditionalGeneration, processor: MoFProcessor, folder: Path) -> None:
    """Write `model` as LlavaForConditionalGeneration with its LlavaProcessor.

    Raises:
        ValueError: for a model that this layout cannot hold, because it has several encoders, another fusion, or a pooled grid.
    """
    encoder, adapter, activation = _single(model)
    refuse_tiles(processor.image_processor)
    vision, tower_state = as_vision_model(encoder)
    has_class = vision.model_type == "clip_vision_model"
    strategy = "default" if has_class else "full"
    config = LlavaConfig(
        vision_config=vision,
        text_config=model.language_model.config,
        image_token_index=model.config.image_token_id,
        image_seq_length=model.mixer.tokens_per_image,
        projector_hidden_act=activation,
        vision_feature_layer=encoder.layer,
        vision_feature_select_strategy=strategy,
        dtype=model.dtype,
    )
    state = {f"model.vision_tower.{key}": value for key, value in tower_state.items()}
    for key, value in adapter.state_dict().items():
        state["model.multi_modal_projector." + key.replace("0.", "linear_1.").replace("2.", "linear_2.")] = value
    for key, value in model.language_model.state_dict().items():
        state[key if key.startswith("lm_head.") else f"model.language_model.{key.removeprefix('model.')}"] = value
    with torch.device("meta"):
        target = LlavaForConditionalGeneration(config)
    with refuse_misfit("the model"):
        target.load_state_dict(state, assign=True)
    target.generation_config = model.generation_config
    target.save_pretrained(folder)
    LlavaProcessor(
        _image_processor(processor, encoder),
        processor.tokenizer,
        patch_size=encoder.patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=processor.chat_template,
        num_additional_image_tokens=int(has_class),
    ).save_pretrained(folder)


def _single(model: MoFForConditionalGeneration) -> tuple[Encoder, nn.Module, str]:
    """Return the only encoder, its adapter, and the adapter's activation.

    Raises:
        ValueError: for a model with more encoders, another fusion, or another adapter.
    """
    mixer: Any = model.mixer
    kind = re.fullmatch(r"mlp2x_(\w+)", mixer.projector)
    if len(mixer.encoders) != 1 or mixer.fusion != "interleaved" or kind is None:
        raise ValueError(
            f"layout hf-llava holds one encoder with a projector of two linears; this model has {', '.join(mixer.encoders)}, fusion "
            f"{mixer.fusion}, projector {mixer.projector}"
        )
    ((name, encoder),) = mixer.encoders.items()
    refuse_pooled(mixer)
    return encoder, mixer.adapters[name], kind[1]


def _image_processor(processor: MoFProcessor, encoder: Encoder) -> LlavaImageProcessor:
    """Return an image processor of transformers that makes the same pixels and has the encoder's mean and std."""
    images, side = processor.image_processor, {"height": encoder.image_size, "width": encoder.image_size}
    squash = images.fit == "squash"
    return LlavaImageProcessor(
        size=side if squash else {"shortest_edge": encoder.image_size},
        crop_size=side,
        do_center_crop=not squash,
        resample=next(number for number, name in FILTERS.items() if name == images.interpolation),
        do_pad=images.fit == "pad",
        image_mean=list(encoder.mean),
        image_std=list(encoder.std),
    )
