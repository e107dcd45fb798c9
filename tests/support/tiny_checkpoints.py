"""Tiny random checkpoints in the published layouts, written as their own code would, for tests that move them in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

SIZE, PATCH, WIDTH, HIDDEN = 28, 7, 128, 32  # two heads of 64, from which OpenAI's and DINOv2's are counted
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
    "initializer_range": 0.2,
}
SQUARE = {"height": SIZE, "width": SIZE}
LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] %}"
    "{{ '<image>\\n' if p['type'] == 'image' else p['text'] }}{% endfor %}{{ ' ' }}{% endfor %}ASSISTANT:"
)


def randomise(module: nn.Module) -> Any:
    """Every parameter drawn anew and not small, also those that start as zeros or ones, so that each is felt."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return module.eval()


def build_clip() -> CLIPVisionModel:
    return randomise(CLIPVisionModel(CLIPVisionConfig(**VISION, hidden_act="quick_gelu")))


def clip_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SQUARE)


def write_clip(folder: Path, clip: CLIPVisionModel) -> None:
    """Write the folder that `mm_vision_tower` refers to."""
    clip.save_pretrained(folder)
    clip_processor().save_pretrained(folder)


def write_hf_llava(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    vision: str = "clip",
    dtype: torch.dtype = torch.float32,
    text: Any = LlamaConfig,
    **changes: Any,
) -> LlavaForConditionalGeneration:
    """LlavaForConditionalGeneration and its processor, saved by transformers."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.padding_side = "left"
    if vision == "clip":
        tower: Any = CLIPVisionConfig(**VISION, hidden_act="quick_gelu")
        strategy, processor, extra = "default", clip_processor(), 1
    else:
        tower, strategy, processor, extra = SiglipVisionConfig(**VISION), "full", SiglipImageProcessor(size=SQUARE), 0
    config = LlavaConfig(
        vision_config=tower,
        text_config=text(vocab_size=len(tokenizer) + 5, **LLAMA),
        image_seq_length=(SIZE // PATCH) ** 2,
        **{"vision_feature_select_strategy": strategy, "image_token_index": tokenizer.convert_tokens_to_ids("<image>"), **changes},
    )
    model = randomise(LlavaForConditionalGeneration(config)).to(dtype)
    model.save_pretrained(folder)
    LlavaProcessor(processor, tokenizer, PATCH, strategy, TEMPLATE, num_additional_image_tokens=extra).save_pretrained(folder)
    return model


def build_dino(side: int = SIZE // PATCH, depth: int = 2) -> dict[str, Tensor]:
    """Random weights by torch.hub's names, positions for `side` x `side` patches of PATCH pixels."""
    sizes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + side**2, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for i in range(depth):
        for name, shape in {
            "norm1": (WIDTH,),
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "norm2": (WIDTH,),
            "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
        }.items():
            sizes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        sizes |= {f"blocks.{i}.ls1.gamma": (WIDTH,), f"blocks.{i}.ls2.gamma": (WIDTH,)}
    return {key: torch.randn(shape) * 0.2 for key, shape in sizes.items()}


def build_projector(*, linear: bool = False) -> dict[str, Tensor]:
    if linear:
        return {"weight": torch.randn(HIDDEN, WIDTH) * 0.2, "bias": torch.randn(HIDDEN)}
    shapes = {"0.weight": (HIDDEN, WIDTH), "0.bias": (HIDDEN,), "2.weight": (HIDDEN, HIDDEN), "2.bias": (HIDDEN,)}
    return {key: torch.randn(shape) * 0.2 for key, shape in shapes.items()}


def build_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return randomise(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA)))


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def write_original(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    state: dict[str, Tensor],
    *,
    shards: int = 1,
    ending: str = ".bin",
    index: bool = True,
    **changes: Any,
) -> None:
    """A folder as LLaVA's own code writes it: config.json with mm_ entries, tokenizer files, shards."""
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = {
        **LlamaConfig(vocab_size=len(tokenizer), **LLAMA).to_dict(),
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip-vit-tiny",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": WIDTH,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6})
    )
    if state:
        write_weights(folder, state, shards, ending, index)


def write_weights(folder: Path, state: dict[str, Tensor], shards: int = 1, ending: str = ".bin", index: bool = True) -> None:
    """One file, or several with or without their index."""
    stem = "pytorch_model" if ending == ".bin" else "model"
    state = {key: value.clone().contiguous() for key, value in state.items()}
    keys, names = list(state), {}
    for i in range(shards):
        name = f"{stem}{ending}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}{ending}"
        part = {key: state[key] for key in keys[i::shards]}
        names |= dict.fromkeys(part, name)
        torch.save(part, folder / name) if ending == ".bin" else save_file(part, folder / name, metadata={"format": "pt"})
    if shards > 1 and index:
        (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def build_parts(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the parts of original checkpoints, as modules and state dicts."""
    return {
        "llama": build_llama(tokenizer),
        "clip": build_clip(),
        "projector": build_projector(),
        "dino projector": build_projector(),
        "dino": build_dino(),
    }


def llava_state(parts: dict[str, Any], tower: bool = True) -> dict[str, Tensor]:
    state = {**parts["llama"].state_dict(), **prefixed("model.mm_projector.", parts["projector"])}
    vision = {f"model.vision_tower.vision_tower.vision_model.{key}": value for key, value in parts["clip"].state_dict().items()}
    return state | (vision if tower else {})


def mof_state(parts: dict[str, Any], towers: bool = True) -> dict[str, Tensor]:
    state = llava_state(parts, towers) | prefixed("model.dino_mm_projector.", parts["dino projector"])
    unused = prefixed("model.dino_tower.clip_vision_tower.vision_model.", parts["clip"].state_dict())
    return state | (prefixed("model.dino_tower.vision_tower.", parts["dino"]) | unused if towers else {})
