"""torch.compile takes encoders, mixers and a training step's model in one graph, and the compiled code gives the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.devices import COMPILER, EXACT

from encoders import build_encoder
from mof import MoFForConditionalGeneration, MoFProcessor
from mof.adapter import build_mixer

pytestmark = pytest.mark.slow

ENCODERS: dict[str, dict[str, Any]] = {  # of every backend's kind, as in LLaVA-like models
    "mini-clip": {},
    "mini-dino": {},
    "dinov3-vit-s16": {"image_size": 32, "pretrained": False},
}


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_encoders(device: str, name: str) -> None:
    encoder = build_encoder(name, **ENCODERS[name]).to(device)
    pixels = torch.randint(0, 256, (2, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8, device=device)
    compiled = torch.compile(encoder, fullgraph=True, backend=COMPILER[device])
    torch.testing.assert_close(compiled(pixels).tokens, encoder(pixels).tokens, **EXACT)
    embed = torch.compile(encoder.embed_image, fullgraph=True, backend=COMPILER[device])
    torch.testing.assert_close(embed(pixels), encoder.embed_image(pixels), **EXACT)


@pytest.mark.parametrize("fusion", ["interleaved", "concat", "gated"])
def test_mixers_and_their_gradients(device: str, fusion: str) -> None:
    mixer = build_mixer(fusion, {"clip": build_encoder("mini-clip"), "dino": build_encoder("mini-dino")}, 32).to(device)
    pixels = torch.randint(0, 256, (2, 3, mixer.image_size, mixer.image_size), dtype=torch.uint8, device=device)
    compiled, gradients = torch.compile(mixer, fullgraph=True, backend=COMPILER[device]), []
    for run in (mixer, compiled):
        mixer.zero_grad()
        run(pixels).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in mixer.parameters() if parameter.requires_grad])
    torch.testing.assert_close(compiled(pixels), mixer(pixels), **EXACT)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_whole_model(device: str, tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    pixels = list(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8))
    texts = ["<image>\nWhat is it?", "First <image> then <image>?"]
    batch = tiny_processor(images=pixels, text=texts, padding=True, return_tensors="pt").to(device)
    model = tiny_model.to(device)
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER[device])
    expected = model(**batch, labels=batch["input_ids"], use_cache=False)
    found = compiled(**batch, labels=batch["input_ids"], use_cache=False)
    torch.testing.assert_close(found.logits, expected.logits, **EXACT)
    torch.testing.assert_close(found.loss, expected.loss, **EXACT)
