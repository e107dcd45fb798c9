"""Caches that the user brings, goes on from or replaces, and assistants: all give what a plain generation gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import build_llm, build_model, build_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, BatchFeature, DynamicCache, Gemma2Config, MambaConfig, StaticCache

from mof import MoFForConditionalGeneration, MoFProcessor

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "sliding_window": 16}
LLMS: dict[str, Callable[[Any], Any]] = {
    "llama": build_llm,
    "gemma2 (sliding window)": lambda words: AutoModelForCausalLM.from_config(Gemma2Config(vocab_size=len(words), **SIZES, **HEADS)),
    "mamba": lambda words: AutoModelForCausalLM.from_config(MambaConfig(vocab_size=len(words), state_size=8, **SIZES)),
}
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
TEXTS, COUNTS = ["<image>\nWhat is it?", "No image.", "First <image> then <image>?"], [1, 0, 2]


def pixels(seed: int) -> Tensor:
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def build(kind: str, seed: int = 0) -> tuple[MoFForConditionalGeneration, MoFProcessor]:
    """A model whose images decide what is written, and its processor."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, LLMS[kind](tokenizer).eval())
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for adapter in model.mixer.adapters.values():
            adapter[2].weight *= 10
    return model, MoFProcessor.from_parts(model, tokenizer)


def prompts(processor: MoFProcessor) -> BatchFeature:
    """Left-padded records with one, no and two images."""
    return processor(images=[pixels(seed) for seed in range(3)], text=TEXTS, padding=True, return_tensors="pt")


def same(actual: Any, expected: Any) -> None:
    """Compare new tokens and their logits."""
    new = len(expected.logits)
    assert torch.equal(actual.sequences[:, -new:], expected.sequences[:, -new:])
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma2 (sliding window)", "mamba"])
def test_caches_that_the_user_brings(kind: str) -> None:
    model, processor = build(kind)
    batch, config = prompts(processor), model.config.text_config
    expected = model.generate(**batch, **OPTIONS, use_cache=False)
    same(model.generate(**batch, **OPTIONS), expected)
    same(model.generate(**batch, **OPTIONS, cache_implementation="static"), expected)
    same(model.generate(**batch, **OPTIONS, cache=DynamicCache(config=config)), expected)
    if kind == "llama":
        same(model.generate(**batch, **OPTIONS, cache=StaticCache(config=config, max_cache_len=200)), expected)


@torch.no_grad()
@pytest.mark.parametrize("given", ["all images", "new images", "new tokens and images"])
@pytest.mark.parametrize("kind", ["llama", "gemma2 (sliding window)", "mamba"])
def test_going_on_from_a_cache(kind: str, given: str) -> None:
    """A second turn brings one more image for each record."""
    model, processor = build(kind)
    first = prompts(processor)
    said = model.generate(**first, **OPTIONS)
    ask = processor(images=[pixels(9)] * 3, text=["And <image> here?"] * 3, return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([said.sequences, ask["input_ids"]], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones(3, ids.shape[1] - first["input_ids"].shape[1], dtype=torch.long)], dim=1)
    earlier = first["pixel_values"].split(COUNTS)
    images = torch.cat([image for record in earlier for image in (*record.split(1), pixels(9)[None])])
    expected = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images, **OPTIONS, use_cache=False)
    known = said.sequences.shape[1] - 1  # the last token was written, and not read yet
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": images,
        "cache": copy.deepcopy(said.get("cache", said.get("past_key_values"))),
    }
    if given != "all images":
        inputs["pixel_values"] = ask["pixel_values"]
    if given == "new tokens and images":
        inputs["input_ids"] = ids[:, known:]
    if kind == "mamba":  # transformers would start anew
        with pytest.raises(ValueError, match=r"Mamba.*one token|image tokens"):
            model.generate(**inputs, **OPTIONS)
        return
    same(model.generate(**inputs, **OPTIONS), expected)


@torch.no_grad()
def test_assistants_see_the_images_once() -> None:
    model, processor = build("llama")
    batch = processor(images=[pixels(1), pixels(2)], text="<image> or <image>\nWhat is it?", return_tensors="pt")
    options = OPTIONS | {"max_new_tokens": 20}
    expected = model.generate(**batch, **options)
    for seed in (0, 5):  # an assistant that agrees, and an assistant that does not
        assistant, _ = build("llama", seed)
        calls: list[int] = []
        assistant.mixer.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(len(inputs[0])))
        same(model.generate(**batch, **options, assistant_model=assistant), expected)
        assert calls == [2]
    same(model.generate(**batch, **options, prompt_lookup_num_tokens=3), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mamba"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_from_embeddings(kind: str, beams: int) -> None:
    """With the images in them, and with image tokens that the images are to replace."""
    model, processor = build(kind)
    batch = prompts(processor)
    expected = model.generate(**batch, **OPTIONS, num_beams=beams)
    embeds, mask = model.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]
    same(
        model.generate(inputs_embeds=embeds, attention_mask=mask, pixel_values=batch["pixel_values"], num_beams=beams, **OPTIONS), expected
    )
    slots = (batch["input_ids"] == model.config.image_token_id).unsqueeze(-1)
    whole = embeds.masked_scatter(slots, model.get_image_features(batch["pixel_values"]).pooler_output)
    same(model.generate(inputs_embeds=whole, attention_mask=mask, num_beams=beams, **OPTIONS), expected)


@torch.no_grad()
def test_left_padding_with_a_state() -> None:
    """Each record of a padded batch has what it has alone. RWKV, which reads padding as text, cannot be joined (`mof.language_model_fit`)."""
    model, processor = build("mamba")
    together = model.generate(**prompts(processor), **OPTIONS)
    first = 0
    for row, (text, count) in enumerate(zip(TEXTS, COUNTS, strict=True)):
        images = [pixels(seed) for seed in range(first, first + count)]
        alone = model.generate(**processor(images=images, text=text, return_tensors="pt"), **OPTIONS, use_cache=False)
        torch.testing.assert_close(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0], rtol=0, atol=1e-4)
        first += count


def test_prompts_that_are_read_in_pieces_are_refused() -> None:
    model, processor = build("llama")
    batch = dict(prompts(processor))
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    with pytest.raises(ValueError, match="pixel_values"):
        model.generate(**batch, prefill_chunk_size=8, **OPTIONS)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="image tokens"):
        model.generate(**batch, image_features=features, prefill_chunk_size=8, **OPTIONS)
