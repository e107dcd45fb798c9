"""Tiny random towers of all backends: 3 blocks deep, 24 wide, on a grid of 4 x 4 patches. None is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast, VJEPA2VideoProcessor

from encoders import Encoder

DEPTH = 3
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
SIZES = {"image_size": 28, "patch_size": 7}
TEXT = {**VISION, "vocab_size": 10, "max_position_embeddings": 8}


def randomised(model: nn.Module) -> nn.Module:
    """Give every parameter a size that matters: many start at zero or one, and would hide what is left out."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def write_clip_configs(folder: Path) -> None:
    """Write the configs of the open_clip models "tiny-native" (own vision transformer) and "tiny-timm" (timm's)."""
    word_tokenizer().save_pretrained(folder / "tokenizer")
    text = {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1}
    text["hf_tokenizer_name"] = str(folder / "tokenizer")
    native = {"layers": DEPTH, "width": 24, "head_width": 12, "patch_size": 7, "image_size": 28}
    wrapped = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 64}
    for name, vision in {"tiny-native": native, "tiny-timm": wrapped}.items():
        config = {"embed_dim": 20, "quick_gelu": name == "tiny-native", "vision_cfg": vision, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "</s>", "a", "photo", "of", "dog", "cat", "red", "blue"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def save_hf(kind: str, folder: Path) -> None:
    """Save a model of this class of transformers, with an image processor and a tokenizer."""
    model_class = getattr(transformers, kind)
    options: dict[str, Any] = {**VISION, **SIZES}
    if kind in ("CLIPModel", "SiglipModel", "MetaClip2Model", "Aimv2Model"):
        options = {"vision_config": {**VISION, **SIZES}, "text_config": TEXT, "projection_dim": 20}
    if kind.startswith("Aimv2"):  # the kind that takes any size
        options.get("vision_config", options)["is_native"] = True
    if kind == "SiglipModel":
        options["text_config"] = {**TEXT, "projection_size": 24}
    if kind == "Tipsv2Model":
        options = {"vision_config": {**VISION, **SIZES}, "text_config": TEXT}
    if kind in ("DINOv3ViTModel", "Tipsv2VisionModel"):
        options["num_register_tokens"] = 2
    if kind == "RadioModel":
        options |= {"max_img_size": 56, "num_cls_tokens": 3, "num_registers": 2, "norm_mean": [0.5, 0.4, 0.3]}
    if kind == "VJEPA2Model":
        predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
        options = {**VISION, **predictor, "crop_size": 28, "patch_size": 7, "mlp_ratio": 2}
    randomised(model_class(model_class.config_class(**options))).save_pretrained(folder)
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    if kind == "VJEPA2Model":
        VJEPA2VideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, **statistics).save_pretrained(folder)
    else:
        CLIPImageProcessor(**statistics, do_normalize=kind != "RadioModel").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def blocks_of(encoder: Encoder) -> nn.ModuleList:
    """Return the transformer blocks of an encoder's vision tower, found by where each backend keeps them."""
    paths = ["visual.transformer.resblocks", "visual.trunk.blocks", "vision_model.encoder.layers", "blocks"]
    paths += ["encoder.layer", "encoder.layers", "layers", "model.layer"]
    modules: dict[str, Any] = dict(encoder.tower.named_modules())
    return next(modules[path] for path in paths if path in modules)


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks on a module and its parts, before and after their forward passes."""
    return [hook for part in module.modules() for hooks in (part._forward_pre_hooks, part._forward_hooks) for hook in hooks.values()]


def block_outputs(blocks: nn.ModuleList, run: Callable[[], object]) -> list[Tensor]:
    """Return what goes into the first block and comes out of each, in order, while `run` runs."""
    outputs: list[Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _block, inputs: outputs.append(inputs[0]))]
    hooks += [block.register_forward_hook(lambda _block, _in, out: outputs.append(out)) for block in blocks]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return outputs
