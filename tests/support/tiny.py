"""Builders of the tiny models that `conftest.py` offers as fixtures, for tests that need several and for scripts."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from encoders import Encoder, available_encoders, build_encoder, register_encoder
from mof import InterleavedMoF, MoFForConditionalGeneration


class TinyEncoder(Encoder):
    """One patch embedding and one mixing layer, with seeded weights. Any input size that the patches divide."""

    flexible = True

    def __init__(self, width: int, patch_size: int, image_size: int, mean: float, seed: int, **options: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tower = nn.Sequential(nn.Conv2d(3, width, patch_size, patch_size), nn.Flatten(2), nn.Dropout(0.5))
        tower.register_buffer("scale", torch.full((1,), 1 + 1 / patch_size), persistent=False)
        statistics = {"mean": (mean,) * 3, "std": (0.25,) * 3}
        sizes = {"width": width, "patch_size": patch_size, "image_size": image_size, "embed_dim": width}
        super().__init__(tower, **sizes, **statistics, depth=1, **options)

    def patch_tokens(self, x: Tensor) -> Tensor:
        return self.tower(x).transpose(1, 2) * self.tower.scale  # [B, h*w, D]

    def image_embedding(self, x: Tensor) -> Tensor:
        return self.patch_tokens(x).mean(dim=1)  # [B, D]

    def change_input_size(self, image_size: int) -> None:
        pass


def _register(key: str, **sizes: Any) -> None:
    """Register a tiny encoder by name, so that models can refer to it. `pretrained=False` gives other weights."""
    if key in available_encoders():
        return

    def factory(image_size: int | None, pretrained: bool, trainable: bool, **_: Any) -> Encoder:
        chosen = {**sizes, "image_size": image_size or sizes["image_size"], "seed": sizes["seed"] + (not pretrained)}
        return TinyEncoder(**chosen, trainable=trainable)

    register_encoder(key)(factory)


_register("tiny-a", width=16, patch_size=8, image_size=32, mean=0.5, seed=1)
_register("tiny-b", width=24, patch_size=4, image_size=24, mean=0.4, seed=3)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, so that every offset is known."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def build_llm(tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Return a tiny Llama with larger weights than usual, so that a change of the input changes the output."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rest = {"vocab_size": len(tokenizer), "initializer_range": 0.2, **changes}
    config = LlamaConfig(**{**sizes, **ids, **rest})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def build_model(tokenizer: PreTrainedTokenizerFast, llm: PreTrainedModel | None = None) -> MoFForConditionalGeneration:
    """Return a model of the two tiny encoders, interleaved, before `llm`, which is a tiny Llama by default."""
    encoders = {"a": build_encoder("tiny-a"), "b": build_encoder("tiny-b")}
    mixer = InterleavedMoF(encoders, hidden_size=32)
    return MoFForConditionalGeneration.from_parts(mixer, llm or build_llm(tokenizer), tokenizer).eval()
