"""A record that is longer than the model's table of positions is cut, where it would end a training with an IndexError."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image
from support.tiny import build_model
from transformers import (
    BloomConfig,
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from mof import MoFProcessor
from vig import SelectiveTrainer, score
from vig.positions import most_tokens

PLACES = 150


def language_model(name: str, vocabulary: int) -> PreTrainedModel:
    sizes = {"vocab_size": vocabulary}
    gpt = {"n_positions": PLACES, "n_embd": 32, "n_layer": 1, "n_head": 4}
    opt = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**sizes, **gpt)),
        "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**sizes, **gpt, rotary_dim=8)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**sizes, **opt, max_position_embeddings=PLACES)),
        "mpt": lambda: MptForCausalLM(MptConfig(**sizes, d_model=32, n_layers=1, n_heads=2, max_seq_len=PLACES)),
    }[name]()


@pytest.mark.parametrize("name", ["gpt2", "codegen", "opt", "mpt"])
def test_scoring_and_training_cut_where_the_positions_end(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(tiny_tokenizer, language_model(name, len(tiny_tokenizer)))
    processor = MoFProcessor.from_parts(model, tiny_tokenizer)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat. " * 60}]
    records = [{"id": "long", "image": Image.new("RGB", (32, 32)), "conversations": turns}]
    with caplog.at_level(logging.WARNING):
        (scored,) = score(model, processor, records)
    assert f"{PLACES} positions" in caplog.text
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    trainer = SelectiveTrainer(model, arguments, train_dataset=records, processing_class=processor)
    trainer.train()
    assert trainer.supervised_tokens == len(scored.token_vig) < 7 * 60  # a byte is a token
    assert scored.token_ids.tolist() == [*trainer.data_collator(records)["labels"][0, -len(scored.token_vig) :].tolist()]


def test_models_without_such_an_end_keep_max_length() -> None:
    remote = PreTrainedConfig(max_position_embeddings=128, rope_theta=1e6)
    for config in (LlavaConfig(), BloomConfig(), GPT2Config(n_positions=4096), remote):
        assert most_tokens(config, 2048) == 2048
