"""Edited attention against a dense reference, and no trace of it afterwards."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from support.families import TEXT, build
from support.tiny import build_model, build_tokenizer
from support.two_passes import TOKENS, chats, encoder, next_logits, settings
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, MambaConfig

from mof import MoFProcessor
from mof.chat_templates import VICUNA
from vig.decoding import PAI, VAR, Decoding

ATTENTION_ONLY = PAI(alpha=0.7, gamma=1, first_layer=0)
SINKS = VAR(tau=2.0, rho=1.0, mass=0.0, keep=0.3, first_layer=0)


class Reference:
    """A plain eager attention that follows the papers, token by token and head by head."""

    def __init__(self, model: Any, method: Decoding, image: Tensor) -> None:
        self.method, self.image, self.states = method, image, {}
        self.prompt = len(image)
        decoder = model.config.get_text_config(decoder=True)
        self.layers = decoder.num_hidden_layers
        for name, module in model.named_modules():
            if (
                type(getattr(module, "config", None)) is type(decoder)
                and hasattr(module, "layer_idx")
                and "Attention" in type(module).__name__
            ):
                model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(self.keeper(module.layer_idx), with_kwargs=True)
                self.module = sys.modules[type(module).__module__]

    def keeper(self, layer: int) -> Any:
        def keep(module: Any, args: Any, kwargs: Any) -> None:
            self.states[layer] = (args[0] if args else kwargs["hidden_states"])[0]

        return keep

    def sinks(self, layer: int) -> list[int]:
        states = self.states[layer][: self.prompt].double()
        large = (states / states.square().mean(-1, keepdim=True).add(1e-6).sqrt()).abs() > self.method.tau
        dims = [d for d in range(states.shape[1]) if any(large[i, d] for i in range(self.prompt) if not self.image[i])]
        return [i for i in range(self.prompt) if self.image[i] and any(large[i, d] for d in dims)]

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        length, heads, layer = query.shape[2], query.shape[1], module.layer_idx
        group = heads // key.shape[1]
        images = self.image.nonzero().flatten().tolist()
        sinks = self.sinks(layer) if isinstance(self.method, VAR) else []
        output = torch.zeros(1, length, heads, value.shape[-1])
        for head in range(heads):
            for i in range(length):
                w = (query[0, head, i] @ key[0, head // group].T * scaling).double()
                if isinstance(self.method, PAI) and i >= self.prompt - 1:
                    w[images] += self.method.alpha * w[images].abs()
                allowed = torch.arange(length) <= i if mask is None else (mask[0, 0, i] if mask.dtype == torch.bool else mask[0, 0, i] > -1)
                p = torch.where(allowed, w, -torch.inf).softmax(-1)
                if isinstance(self.method, VAR) and i > images[-1] and layer < self.layers - 1:
                    p = self.moved(p, images, sinks)
                output[0, i, head] = (p @ value[0, head // group].double()).float()
        return output, None

    def moved(self, p: Tensor, images: list[int], sinks: list[int]) -> Tensor:
        others = [i for i in images if i not in sinks]
        if p[images].sum() < self.method.mass or p[sinks].sum() > self.method.rho * p[images].sum() or not p[others].sum() > 0:
            return p
        moved = p.clone()
        moved[sinks] = self.method.keep * p[sinks]
        moved[others] += (1 - self.method.keep) * p[sinks].sum() * p[others] / p[others].sum()
        return moved


@pytest.mark.slow
@pytest.mark.parametrize("method", [ATTENTION_ONLY, SINKS], ids=["pai", "var"])
@pytest.mark.parametrize(
    ("family", "cached"), [("ours", True), ("ours", False), ("llava", True), ("internvl", True), ("qwen2_5_vl", True), ("gemma3", True)]
)
def test_edited_attention(
    family: str, method: Decoding, cached: bool, tiny_model: Any, tiny_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = (tiny_model, tiny_processor) if family == "ours" else build(family)
    encode, asked = encoder(processor), chats((1, 2))
    inputs = encode(asked)
    output = model.generate(**inputs, **settings(processor), **method.options(asked, encode), use_cache=cached)
    start, changed = inputs["input_ids"].shape[1], 0
    for row, chat in enumerate(asked):
        alone, other = encode([chat]), copy.deepcopy(model)
        reference = Reference(other, method, alone["input_ids"][0] == model.config.image_token_id)
        other.config.get_text_config(decoder=True)._attn_implementation = "eager"
        for module in other.modules():
            if type(getattr(module, "config", None)) is type(model.config.get_text_config(decoder=True)):
                module.config._attn_implementation = "eager"
        for step in (0, TOKENS - 1):
            generated = output.sequences[row : row + 1, start : start + step]
            plain = next_logits(model, alone, generated)
            with monkeypatch.context() as patch:
                patch.setattr(reference.module, "eager_attention_forward", reference)
                expected = next_logits(other, alone, generated)
            torch.testing.assert_close(output.logits[step][row : row + 1].double(), expected, atol=1e-4, rtol=1e-4)
            changed += not torch.allclose(plain, expected)
    assert changed


def attention_names(model: Any) -> list[Any]:
    return [getattr(getattr(module, "config", None), "_attn_implementation", None) for module in model.modules()]


@pytest.mark.parametrize("method", [PAI(first_layer=0), SINKS], ids=["pai", "var"])
@pytest.mark.parametrize("broken", [False, True])
def test_nothing_is_left_behind(method: Decoding, broken: bool, tiny_model: Any, tiny_processor: Any) -> None:
    encode, asked = encoder(tiny_processor), chats()
    inputs, options = encode(asked), settings(tiny_processor)
    plain, names, state = tiny_model.generate(**inputs, **options), attention_names(tiny_model), set(vars(tiny_model))
    head = tiny_model.language_model.lm_head
    stop = head.register_forward_hook(lambda *_: 1 / 0) if broken else None
    if stop:
        with pytest.raises(ZeroDivisionError):
            tiny_model.generate(**inputs, **options, **method.options(asked, encode))
        stop.remove()
    else:
        tiny_model.generate(**inputs, **options, **method.options(asked, encode))
    assert attention_names(tiny_model) == names and set(vars(tiny_model)) == state
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in tiny_model.modules())
    again = tiny_model.generate(**inputs, **options)
    assert all(map(torch.equal, plain.logits, again.logits))


def test_pai_with_both_parts_contrasts_with_plain_attention(tiny_model: Any, tiny_processor: Any) -> None:
    encode, asked = encoder(tiny_processor), chats((1,))
    inputs, options = encode(asked), settings(tiny_processor) | {"max_new_tokens": 1}
    edited = tiny_model.generate(**inputs, **options, **ATTENTION_ONLY.options(asked, encode)).logits[0]
    both = PAI(alpha=0.7, gamma=2, beta=0, first_layer=0)
    null = next_logits(tiny_model, encode([both.null_chat(asked[0])]), inputs["input_ids"][:, :0])
    p, null_p = edited.double().log_softmax(-1), null.log_softmax(-1)
    made = tiny_model.generate(**inputs, **options, **both.options(asked, encode)).logits[0]
    torch.testing.assert_close(made.double(), 2 * (p - null_p) + null_p, atol=1e-4, rtol=1e-4)


def test_attention_in_beams_equals_the_uncached_search(tiny_model: Any, tiny_processor: Any) -> None:
    encode, asked = encoder(tiny_processor), chats((1, 2))
    made = [
        tiny_model.generate(
            **encode(asked), **settings(tiny_processor), **SINKS.options(asked, encode), num_beams=3, use_cache=cached, output_scores=True
        )
        for cached in (True, False)
    ]
    assert torch.equal(made[0].sequences, made[1].sequences)
    torch.testing.assert_close(made[0].sequences_scores, made[1].sequences_scores, atol=1e-4, rtol=1e-4)


def joined(config: Any) -> tuple[Any, Any]:
    """Our model with a language model of transformers."""
    words = build_tokenizer()
    model = build_model(words, AutoModelForCausalLM.from_config(config).eval())
    return model, MoFProcessor.from_parts(model, words, chat_template=VICUNA)


def mamba() -> tuple[Any, Any]:
    return joined(MambaConfig(vocab_size=300, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0, initializer_range=0.3))


@pytest.mark.parametrize("cap", [None, 1.0])
def test_caps_and_static_caches(cap: float | None) -> None:
    """Gemma 2's capped scores, and sliding windows in every other layer."""
    sizes = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "vocab_size": 300, "pad_token_id": 0, "initializer_range": 0.3}
    model, processor = joined(Gemma2Config(**sizes, attn_logit_softcapping=cap, sliding_window=16, attn_implementation="eager"))
    encode, asked = encoder(processor), chats((1, 2))
    made = [
        model.generate(**encode(asked), **settings(processor), **ATTENTION_ONLY.options(asked, encode), **options).logits
        for options in ({}, {"cache_implementation": "static"}, {"use_cache": False})
    ]
    plain = model.generate(**encode(asked), **settings(processor)).logits
    assert not torch.allclose(made[0][0], plain[0])
    for step in zip(*made, strict=True):
        torch.testing.assert_close(step[0], step[1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step[0], step[2], atol=1e-4, rtol=1e-4)


def test_a_recurrent_model_is_refused() -> None:
    model, processor = mamba()
    with pytest.raises(ValueError, match="pai.*MoF.*mamba"):
        model.generate(**encoder(processor)(chats((1,))), max_new_tokens=2, custom_generate=ATTENTION_ONLY)


@pytest.mark.parametrize("family", ["mllama", "blip2"])
def test_models_whose_images_are_no_tokens_are_refused(family: str) -> None:
    model, processor = build(family)
    inputs = encoder(processor)(chats((1,)))
    with pytest.raises(ValueError, match=f"pai.*{'OPTForCausalLM' if family == 'blip2' else 'Mllama'}"):
        model.generate(**inputs, max_new_tokens=2, custom_generate=ATTENTION_ONLY)


def test_models_without_edited_layers_are_refused(tiny_model: Any, tiny_processor: Any) -> None:
    encode, asked = encoder(tiny_processor), chats((1,))
    inputs = encode(asked)
    with pytest.raises(ValueError, match="layers from 2 on.*has 2"):
        tiny_model.generate(**inputs, max_new_tokens=2, custom_generate=PAI(gamma=1))
    with pytest.raises(ValueError, match="32 wide.*5.7.*tau than 20"):
        tiny_model.generate(**inputs, max_new_tokens=2, custom_generate=VAR(first_layer=0))


def test_a_prompt_in_parts_is_refused(tiny_model: Any, tiny_processor: Any) -> None:
    inputs = encoder(tiny_processor)(chats((1,)))
    asked = {**inputs, **settings(tiny_processor)}
    with pytest.raises(ValueError, match="pai.*prefill_chunk_size=4"):
        tiny_model.generate(**asked, prefill_chunk_size=4, custom_generate=ATTENTION_ONLY)
    first = tiny_model.generate(**asked)
    longer = torch.cat([first.sequences, first.sequences[:, -1:]], dim=1)
    again = asked | {"input_ids": longer, "attention_mask": torch.ones_like(longer), "past_key_values": first.past_key_values}
    with pytest.raises(ValueError, match="var.*whole prompt.*layer 0.*llama"):
        tiny_model.generate(**again, custom_generate=SINKS)
