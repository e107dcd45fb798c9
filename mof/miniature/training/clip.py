"""mini-clip: contrastive training on captions as sparse as web captions, hence blind to much."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from transformers import PreTrainedTokenizerFast

import encoders.miniature  # noqa: F401  registers mof_mini_vit
from mof.miniature.language import web_caption
from mof.miniature.training.pictures import light, normalised, picture_pool, view
from mof.miniature.training.steps import Log, cosine, parameter_groups, save_half, set_rate
from mof.miniature.training.tokenizer import save_tokenizer


def clip_config() -> dict[str, Any]:
    return {
        "embed_dim": 128,
        "vision_cfg": {"timm_model_name": "mof_mini_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 40},
        "text_cfg": {"context_length": 16, "vocab_size": 512, "width": 128, "heads": 4, "layers": 2, "hf_tokenizer_name": "mini-clip"},
    }  # fmt: skip


def train_clip(out: Path, scale: float) -> None:
    """Contrastive training (open_clip's CLIP and loss) on pictures and what the web would say about them."""
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    pool, scenes = picture_pool(int(60_000 * scale), seed=1)
    folder = out / "mini-clip"
    save_tokenizer(folder, "<s> $A </s>")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    config = clip_config()
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    batch, steps = 256, int(800 * scale)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), betas=(0.9, 0.98))
    contrast, log = open_clip.ClipLoss(), Log(folder, steps, batch)
    for step in range(steps):
        set_rate(optimizer, cosine(step, steps, 1e-3))
        chosen = rng.integers(len(pool), size=batch)
        texts = tokenizer([web_caption(scenes[i], rng) for i in chosen], padding="max_length", max_length=16, return_tensors="pt")
        image, text, temperature = model(normalised(light(view(pool[chosen], 0.85))), texts["input_ids"])
        loss = contrast(image, text, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        log(loss=loss)
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1))
    save_half(model, folder / "open_clip_model.safetensors")
