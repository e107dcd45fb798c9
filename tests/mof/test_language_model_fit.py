"""Language models of many families behind a mixer: they work, saved and loaded too, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from support.tiny import build_llm, build_model, build_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from encoders import build_encoder
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFProcessor

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
GATED: dict[str, Any] = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
BY_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 259, **LAYERS}  # one token fewer than there are

WORK: dict[str, dict[str, Any]] = {
    "OPT": {**SIZES, "word_embed_proj_dim": 16, "ffn_dim": 64, "do_layer_norm_before": False},
    "Electra": {**SIZES, "embedding_size": 16, "intermediate_size": 64, "is_decoder": True},
    "FalconH1": {**GATED, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "ssm_multipliers": [0.5, 2.0, 3.0, 0.3, 0.7]},
    "Gemma3nText": {**GATED, **BY_LAYER, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 2},
    "Gemma4Text": {**GATED, **BY_LAYER, "num_kv_shared_layers": 0},
    "MiniMax": {**GATED, "num_local_experts": 2, "layer_types": ["full_attention", "linear_attention"]},
    "Jamba": {**{k: v for k, v in GATED.items() if k != "head_dim"}, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "Mixtral": {**GATED, "num_local_experts": 2},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Rwkv": ({"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 32}, "padding on the left"),
    "RecurrentGemma": ({**SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16}, "padding on the left"),
    "Bart": (
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "is_decoder": True},
        "padding on the left",
    ),
    "Roberta": ({**SIZES, "intermediate_size": 64, "is_decoder": True}, "more of tokens than of their embeddings"),
}


def build(name: str, **sizes: Any) -> PreTrainedModel:
    """Return a random language model whose weights are larger than usual, so that faults show."""
    kind = getattr(transformers, f"{name}Config", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(kind(vocab_size=259, **sizes)).eval()
    with torch.no_grad():
        for weight in llm.parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 0.15)
    return llm


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


@torch.no_grad()
@pytest.mark.parametrize("name", WORK)
def test_a_family_that_works(name: str, tmp_path: Path) -> None:
    llm, tokenizer = build(name, **WORK[name]), build_tokenizer()
    mixer = InterleavedMoF({"a": build_encoder("tiny-a")}, hidden_size=llm.get_input_embeddings().weight.shape[1])
    model = MoFForConditionalGeneration.from_parts(mixer, llm, tokenizer).eval()
    processor = MoFProcessor.from_parts(model, tokenizer)
    texts, images = ["<image>\nWhat is it?", "No.", "<image> or <image>?"], [[picture(0)], [], [picture(1), picture(2)]]
    alone = [processor(images=own or None, text=text, return_tensors="pt") for text, own in zip(texts, images, strict=True)]
    batch = processor(images=[*images[0], *images[2]], text=texts, padding=True, return_tensors="pt")
    changed = processor(images=[picture(3), *images[2]], text=texts, padding=True, return_tensors="pt")
    logits, others = model(**batch).logits, model(**changed).logits
    for row, inputs in enumerate(alone):
        torch.testing.assert_close(logits[row, -inputs["input_ids"].shape[1] :], model(**inputs).logits[0], atol=1e-3, rtol=1e-3)
        assert torch.allclose(logits[row, -1], others[row, -1], atol=1e-3) == bool(row)  # a record depends on its own image
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    written = model.generate(**batch, **options)
    assert torch.equal(written, model.generate(**batch, **options, use_cache=False))
    model.save_pretrained(tmp_path)
    assert torch.equal(MoFForConditionalGeneration.from_pretrained(tmp_path).eval()(**batch).logits, logits)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_refused(name: str) -> None:
    sizes, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{name}\w* cannot be the language model of a MoF: .*{reason}"):
        build_model(build_tokenizer(), build(name, **sizes))


def test_text_alone_gives_what_the_language_model_gives() -> None:
    """Gemma 3n adds a table row per token in every layer, which embeddings alone would lose."""
    llm = build("Gemma3nText", **WORK["Gemma3nText"])
    model = build_model(build_tokenizer(), llm)
    ids = torch.tensor([[5, 60, 7, 200]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, llm(input_ids=ids).logits)


def test_a_mixer_of_another_width_is_refused(tiny_model: MoFForConditionalGeneration) -> None:
    llm = build("OPT", **WORK["OPT"])
    with pytest.raises(ValueError, match=r"32 channels.* OPTForCausalLM have 16.*hidden_size=16"):
        build_model(build_tokenizer(), llm)
    with pytest.raises(ValueError, match="31 channels.*32"):
        features = torch.zeros(1, 4, 31)
        tiny_model(input_ids=torch.full((1, 4), tiny_model.config.image_token_id), image_features=features)


def test_modes_are_left_as_they_were() -> None:
    tokenizer = build_tokenizer()
    llm = build_llm(tokenizer).train()
    llm.model.norm.eval()
    model = MoFForConditionalGeneration.from_parts(InterleavedMoF({"a": build_encoder("tiny-a")}, hidden_size=32), llm, tokenizer)
    assert llm.training and not llm.model.norm.training and not model.mixer.encoders["a"].tower.training
