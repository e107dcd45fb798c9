"""Each step of a contrast against two plain passes over the whole sequence, for our model and other classes of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import build, picture
from torch import Tensor

from vig.decoding import ICD, LACING, M3ID, PAI, VCD, Decoding, build_decoding

FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl", "aya_vision", "paligemma", "gemma3", "ovis2")
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
    return lambda asked: processor.apply_chat_template(asked, **options, processor_kwargs={"padding": True})


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
    with torch.no_grad():
        return model(**grown, use_cache=False).logits[:, -1].double()


def cut(scores: Tensor, logits: Tensor, beta: float) -> Tensor:
    p = logits.softmax(-1)
    return torch.where(p < beta * p.max(-1, keepdim=True).values, -torch.inf, scores)


def m3id(a: Tensor, b: Tensor, t: int) -> Tensor:
    kept = math.exp(-0.3 * t)
    return torch.where(a.softmax(-1).max(-1, keepdim=True).values < 0.4, a + (1 - kept) / kept * (a - b), a)


def pai(a: Tensor, b: Tensor, t: int) -> Tensor:
    p, u = a.log_softmax(-1), b.log_softmax(-1)
    return cut(2 * (p - u) + u, a, 0.1)


METHODS: dict[str, tuple[Decoding, Callable[[Tensor, Tensor, int], Tensor]]] = {
    "vcd": (VCD(), lambda a, b, t: cut(2 * a - b, a, 0.1)),
    "icd": (ICD(alpha=0.5, beta=0.2), lambda a, b, t: cut(1.5 * a - 0.5 * b, a, 0.2)),
    "m3id": (M3ID(decay=0.3), m3id),
    "pai": (PAI(alpha=0, gamma=2), pai),
    "lacing": (LACING(scale=2.5), lambda a, b, t: b + 2.5 * (a - b)),
}


def check(model: Any, processor: Any, method: Decoding, formula: Any, asked: list[Any], **options: Any) -> None:
    """Compare all rows of a batch with each record alone, so without padding."""
    encode = encoder(processor)
    inputs = encode(asked)
    output = model.generate(**inputs, **settings(processor), **method.options(asked, encode), **options)
    for row, chat in enumerate(asked):
        clean, null = encode([chat]), encode([method.null_chat(chat)])
        for step in range(TOKENS):
            start = inputs["input_ids"].shape[1]
            generated = output.sequences[row : row + 1, start : start + step]
            logits = next_logits(model, clean, generated)
            expected = formula(logits, next_logits(model, null, generated), step + 1)
            torch.testing.assert_close(output.logits[step][row : row + 1].double(), expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(expected, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_vcd_in_other_families(family: str) -> None:
    model, processor = build(family)
    check(model, processor, *METHODS["vcd"], chats())
