"""mini-clip is trained contrastively on captions as sparse as web captions, so it is blind to much."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import encoders.miniature  # noqa: F401  registers mof_mini_vit
from mof.miniature.language import web_caption
from mof.miniature.training.fitting import Log, fit, save_half
from mof.miniature.training.lm import save_tokenizer
from mof.miniature.training.pictures import light, normalised, picture_pool, view


def clip_config() -> dict[str, Any]:
    """Return the model's configuration as open_clip writes it."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"timm_model_name": "mof_mini_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 40},
        "text_cfg": {"context_length": 16, "vocab_size": 512, "width": 128, "heads": 4, "layers": 2, "hf_tokenizer_name": "mini-clip"},
    }  # fmt: skip


def train_clip(out: Path, scale: float) -> None:
    """Train open_clip's CLIP with its contrastive loss on pictures and web captions, and write it to `out`/mini-clip."""
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    pool, scenes = picture_pool(int(60_000 * scale), seed=1)
    folder = out / "mini-clip"
    save_tokenizer(folder, "<s> $A </s>")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    config = clip_config()
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    batch, steps = 256, int(800 * scale)
    contrast = open_clip.ClipLoss()

    def draw_losses() -> dict[str, Tensor]:
        chosen = rng.integers(len(pool), size=batch)
        texts = tokenizer([web_caption(scenes[i], rng) for i in chosen], padding="max_length", max_length=16, return_tensors="pt")
        image, text, temperature = model(normalised(light(view(pool[chosen], 0.85))), texts["input_ids"])
        return {"loss": contrast(image, text, temperature)}

    def limit_temperature(_step: int) -> None:
        model.logit_scale.data.clamp_(0, math.log(100))

    log = Log(folder, steps, batch)
    fit(model, draw_losses, steps=steps, rate=1e-3, decay=0.1, log=log, after_step=limit_temperature)
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1))
    save_half(model, folder / "open_clip_model.safetensors")
