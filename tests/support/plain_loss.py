"""Tiny models of many classes, random batches of tokens for them, and the loss from the logits of all positions."""

from __future__ import annotations

import torch
import transformers
from torch.nn import functional as F

VOCABULARY = 89
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
TEXT |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN_VISION = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}
IMAGE = {"image_token_id": 5}

CASES = {
    "Llava": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model", **VISION}, **IMAGE},
    "LlavaOnevision": {"text_config": {"model_type": "qwen2", **TEXT}, "vision_config": {"model_type": "siglip_vision_model", **VISION}, **IMAGE},
    "Qwen2_5_VL": {"text_config": {"model_type": "qwen2_5_vl_text", **TEXT, **ROPE}, "vision_config": QWEN_VISION, **IMAGE},
    "Qwen3VL": {"text_config": {"model_type": "qwen3_vl_text", **TEXT, **ROPE, "head_dim": 16}, "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]}, **IMAGE},
    "Idefics3": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, **IMAGE},
    "SmolVLM": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, **IMAGE},
    "InternVL": {"text_config": {"model_type": "qwen2", **TEXT}, "vision_config": {"model_type": "internvl_vision", **VISION, "image_size": [28, 28], "patch_size": [14, 14]}, **IMAGE},
    "PaliGemma": {"text_config": {"model_type": "gemma2", **TEXT, "final_logit_softcapping": 3.0, "head_dim": 16}, "vision_config": {"model_type": "siglip_vision_model", **VISION, "vocab_size": VOCABULARY}, **IMAGE},
    "Gemma3": {"text_config": {"model_type": "gemma3_text", **TEXT, "head_dim": 16}, "vision_config": {"model_type": "siglip_vision_model", **VISION}, **IMAGE},
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    torch.manual_seed(0)
    return kind(kind.config_class(**CASES[name])).train()


def batch(padding: str = "right", seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Three rows of 12 tokens, the last one padded; the supervised tokens lie anywhere."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, (3, 12), generator=generator)
    attended = torch.ones_like(ids)
    attended[2, slice(8, None) if padding == "right" else slice(4)] = 0
    chosen = (torch.rand(ids.shape, generator=generator) < 0.4) & (attended == 1)
    chosen[:, 0] = False
    return {"input_ids": ids.where(attended == 1, 0), "attention_mask": attended}, ids.where(chosen, -100)


def plainly(model, inputs, labels, weights=None):
    """The loss from the logits of all positions."""
    logits = model(**inputs).logits.float()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    weights = torch.ones_like(losses) if weights is None else weights[:, 1:].flatten()
    return (losses * weights * (labels[:, 1:].flatten() != -100)).sum() / (labels != -100).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
