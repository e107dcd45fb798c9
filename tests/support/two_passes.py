"""Conversations for tests of decoding, and plain passes to compare generation with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.families import picture

TOKENS = 5


def chats(images: tuple[int, ...] = (1, 1)) -> list[list[dict[str, Any]]]:
    """Conversations with questions of different lengths and so many images."""
    made = []
    for row, count in enumerate(images):
        shown = [{"type": "image", "image": picture(10 * row + i, ((60, 40), (40, 80))[(row + i) % 2])} for i in range(count)]
        made.append([{"role": "user", "content": [*shown, {"type": "text", "text": "Which? " + "really " * (4 * row)}]}])
    return made


def encoder(processor: Any) -> Callable[[list[Any]], Any]:
    processor.tokenizer.padding_side = "left"
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}

    def encode(asked: list[Any]) -> dict[str, Any]:
        inputs = processor.apply_chat_template(asked, **options, processor_kwargs={"padding": True})
        return {name: value for name, value in inputs.items() if name != "labels"}  # PaliGemma's gives them

    return encode


def settings(processor: Any) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    special = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    asked = {"max_new_tokens": TOKENS, "suppress_tokens": special, "eos_token_id": None, "pad_token_id": 0}
    return {**asked, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def next_logits(model: Any, inputs: Any, generated: Tensor) -> Tensor:
    """The logits [R, V] behind the inputs and the generated tokens [R, N], by a plain pass without a cache."""
    grown = dict(inputs)
    kinds = {"input_ids": generated, "attention_mask": torch.ones_like(generated), "mm_token_type_ids": torch.zeros_like(generated)}
    kinds["token_type_ids"] = torch.full_like(generated, int(model.config.model_type == "paligemma"))
    grown |= {name: torch.cat([inputs[name], added], dim=1) for name, added in kinds.items() if name in inputs}
    if (aside := inputs.get("cross_attention_mask")) is not None:
        grown["cross_attention_mask"] = torch.cat([aside, *[aside[:, -1:]] * generated.shape[1]], dim=1)
    with torch.no_grad():
        return model(**grown, use_cache=False).logits[:, -1].double()
