"""Original LLaVA-1.5 and released MoF folders in, against CLIP, DINOv2 and Llama put together here by the rules alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter
from tiny_checkpoints import (
    PATCH,
    SIZE,
    WIDTH,
    build_clip,
    build_dino,
    build_llama,
    build_projector,
    prefixed,
    write_clip,
    write_original,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerFast

from encoders import build_encoder
from mof import MoFForConditionalGeneration
from mof.llava_checkpoints import Loaded, load_checkpoint

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OWN_MEAN, OWN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOISE = Image.effect_noise((90, 120), 200).convert("RGB").filter(ImageFilter.GaussianBlur(2))
IMAGES = [NOISE.crop((0, 0, *size)) for size in ((60, 40), (28, 28), (56, 100))]
PROMPTS = ["USER: <image>\nWhat? ASSISTANT:", "USER: <image> and <image>\nWhich of these two? ASSISTANT:", "No image."]


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def clip_features(clip: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """hidden_states[-2] without the class token."""
    return clip(normalised(pixels, CLIP_MEAN, CLIP_STD), output_hidden_states=True).hidden_states[-2][:, 1:]


def dino_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """`x_prenorm` of torch.hub's DINOv2, written down from its definition: pre-norm blocks with layer scale, no final norm."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    count, table = x.shape[1], state["pos_embed"]
    n, side = math.isqrt(table.shape[1] - 1), math.isqrt(count)
    patches = table[:, 1:].reshape(1, n, n, WIDTH).permute(0, 3, 1, 2)
    if n != side:
        patches = F.interpolate(patches, scale_factor=(float(side + 0.1) / n,) * 2, mode="bicubic", antialias=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, count, WIDTH)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + torch.cat([table[:, :1], patches], 1)
    for i in range(len([key for key in state if key.endswith("norm1.weight")])):
        name = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)  # one head of 64
        x = x + linear((q @ k.mT / 8).softmax(-1) @ v, f"{name}.attn.proj") * state[f"{name}.ls1.gamma"]
        hidden = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + linear(hidden, f"{name}.mlp.fc2") * state[f"{name}.ls2.gamma"]
    return x[:, 1:]


def project(state: dict[str, Tensor], features: Tensor) -> Tensor:
    if "weight" in state:
        return features @ state["weight"].T + state["bias"]
    return F.gelu(features @ state["0.weight"].T + state["0.bias"]) @ state["2.weight"].T + state["2.bias"]


def check(loaded: Loaded, llama: LlamaForCausalLM, features: Tensor) -> None:
    """Logits and greedy answers of the loaded model against `llama` on `features` [M, T, D] put in by hand, row by row."""
    inputs = loaded.processor(images=IMAGES, text=PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**inputs).logits
    written = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    images = iter(features)
    vocabulary = llama.config.vocab_size
    for row, prompt in enumerate(PROMPTS):
        pieces = [loaded.processor.tokenizer(piece, return_tensors="pt")["input_ids"].long() for piece in prompt.split("<image>")]
        embeds = [llama.get_input_embeddings()(pieces[0])]
        for piece in pieces[1:]:
            embeds += [next(images)[None], llama.get_input_embeddings()(piece)]
        embeds = torch.cat(embeds, dim=1)
        with torch.no_grad():
            expected = llama(inputs_embeds=embeds).logits[0]
            answer = llama.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=6, pad_token_id=0)[0]
        kept = inputs["attention_mask"][row].bool()
        assert expected.std() > 0.1 and kept.sum() == len(expected)
        assert (logits[row, kept, :vocabulary] - expected).abs().max() < 1e-4
        assert torch.equal(written[row, : len(answer)], answer)


@pytest.fixture
def parts(tiny_tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "llama": build_llama(tiny_tokenizer),
        "clip": build_clip(),
        "projector": build_projector(),
        "dino projector": build_projector(),
        "dino": build_dino(),
    }


def llava_state(parts: dict, tower: bool = True) -> dict[str, Tensor]:
    state = {**parts["llama"].state_dict(), **prefixed("model.mm_projector.", parts["projector"])}
    vision = {f"model.vision_tower.vision_tower.vision_model.{key}": value for key, value in parts["clip"].state_dict().items()}
    return state | (vision if tower else {})


def mof_state(parts: dict, towers: bool = True) -> dict[str, Tensor]:
    state = llava_state(parts, towers) | prefixed("model.dino_mm_projector.", parts["dino projector"])
    unused = prefixed("model.dino_tower.clip_vision_tower.vision_model.", parts["clip"].state_dict())
    return state | (prefixed("model.dino_tower.vision_tower.", parts["dino"]) | unused if towers else {})


def pixels_of(loaded: Loaded) -> Tensor:
    return loaded.processor(images=IMAGES, text="<image>" * 3, return_tensors="pt")["pixel_values"]


def padded(image: Image.Image, size: int) -> Tensor:
    """LLaVA's expand2square with CLIP's mean colour, then CLIP's resize."""
    square = Image.new("RGB", (max(image.size),) * 2, tuple(int(255 * mean) for mean in CLIP_MEAN))
    square.paste(image, tuple((max(image.size) - side) // 2 for side in image.size))
    pixels = square.resize((size, size), Image.Resampling.BICUBIC)
    return torch.tensor(list(pixels.getdata())).view(size, size, 3).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("shards", "ending", "index"),
    [
        (1, ".bin", True),
        (3, ".bin", True),
        (3, ".bin", False),
        (1, ".safetensors", True),
        (2, ".safetensors", True),
        (2, ".safetensors", False),
    ],
)
def test_llava(shards: int, ending: str, index: bool, parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_original(tmp_path, tiny_tokenizer, llava_state(parts), shards=shards, ending=ending, index=index)
    loaded = load_checkpoint(tmp_path)
    assert loaded.layout == "llava" and loaded.tensors == len(llava_state(parts)) and loaded.unused == []
    pixels = pixels_of(loaded)
    for image, own in zip(IMAGES, pixels, strict=True):
        assert (padded(image, SIZE) - own.long()).abs().max() <= 1
    check(loaded, parts["llama"], project(parts["projector"], clip_features(parts["clip"], pixels)))


def test_released_mof(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_original(tmp_path, tiny_tokenizer, mof_state(parts), shards=2)
    loaded = load_checkpoint(tmp_path)
    assert loaded.layout == "released-mof" and loaded.tensors == len(mof_state(parts))
    assert len(loaded.unused) == len(parts["clip"].state_dict()) and all("clip_vision_tower" in key for key in loaded.unused)
    assert "DINOv2 is given pixels normalised for CLIP" in caplog.text
    pixels = pixels_of(loaded)
    clip = project(parts["projector"], clip_features(parts["clip"], pixels))

    def interleaved(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        dino = project(parts["dino projector"], dino_features(parts["dino"], normalised(pixels, mean, std)))
        mixed = torch.empty(len(pixels), 2 * clip.shape[1], clip.shape[2])
        mixed[:, 0::2], mixed[:, 1::2] = clip, dino
        return mixed

    check(loaded, parts["llama"], interleaved(CLIP_MEAN, CLIP_STD))
    check(load_checkpoint(tmp_path, released_preprocessing=False), parts["llama"], interleaved(OWN_MEAN, OWN_STD))
