"""Low-rank adapters at every weight matrix of a language model's blocks, whatever class keeps the matrix."""

from __future__ import annotations

import pytest
import torch
from support.tiny import build_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV3Config,
    GPT2Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from vig.training.preparation import add_lora

pytest.importorskip("peft")
SIZES = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
EXPERTS = {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2, head_dim=8),
    "gpt_oss": GptOssConfig(**SIZES, **EXPERTS),
    "deepseek_v3": DeepseekV3Config(**SIZES, **LATENT, moe_intermediate_size=48, n_routed_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_large_matrix_of_the_blocks_learns_and_merges(tiny_tokenizer, config: PretrainedConfig) -> None:
    """A weight matrix that is no embedding, norm, router or bias changes by the adapters; the merged model gives the adapted logits."""
    torch.manual_seed(0)
    model = build_model(tiny_tokenizer, AutoModelForCausalLM.from_config(config))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    blocks = {name for name, weight in model.named_parameters() if any(part.isdigit() for part in name.split(".")) and weight.ndim > 1}
    small = ("bias", "router", "gate.weight", "wte", "wpe", "mixer")
    matrices = {name for name in blocks if not any(word in name for word in small)}
    adapted = add_lora(model, 2)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    ids = torch.randint(3, 250, (2, 9))
    adapted.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)
    with torch.no_grad():
        logits = adapted.eval()(input_ids=ids, use_cache=False).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids, use_cache=False).logits, logits, atol=1e-5, rtol=1e-5)
    after = dict(merged.named_parameters())
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == matrices
    for name in matrices:
        step = after[name] - before[name]
        assert torch.linalg.matrix_rank(step, rtol=1e-3).max() <= 2


def test_a_language_model_without_linear_layers_is_refused(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(tiny_model, "get_decoder", nn.Identity)
    with pytest.raises(ValueError, match="Identity has no linear layer"):
        add_lora(tiny_model, 2)


def test_matrices_out_of_reach_are_named(tiny_tokenizer, caplog, monkeypatch) -> None:
    """DBRX's experts are read by another module than the one that keeps them."""
    experts, attention = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}, {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    config = DbrxConfig(vocab_size=264, d_model=32, n_heads=4, n_layers=2, ffn_config=experts, attn_config=attention)
    model = build_model(tiny_tokenizer, AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match=r"LoRA reaches 12% of the weights in the blocks of Dbrx\w+: 6 large matrices .*experts\.mlp"):
        add_lora(model, 2)
    monkeypatch.setattr("vig.training.preparation.MOST_MISSED", 0.9)
    adapted = add_lora(model, 2)
    assert "6 large matrices get no adapters" in caplog.text and "experts.mlp" in caplog.text
    assert adapted(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all()
