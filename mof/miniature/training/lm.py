"""mini-lm: next-word training on text alone, so that it has language habits to overcome."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mof.miniature.language import facts, talk
from mof.miniature.scenes import Scene, sample_scene
from mof.miniature.training.steps import Log, cosine, parameter_groups, set_rate
from mof.miniature.training.tokenizer import save_tokenizer


def soft_tokens(scene: Scene, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The scene's facts as 20 to 50 soft tokens: how much of each word of the vocabulary every one of them holds, [K, V].

    A fact is in few of them or in many, weak or strong, but always somewhere: like what an image tells.
    """
    words = tokenizer([f" {fact}" for fact in facts(scene)], add_special_tokens=False)["input_ids"]
    count, known = int(rng.integers(20, 51)), len(words)
    held = (rng.random((count, known)) < rng.uniform(0.05, 0.5, known)) * rng.uniform(0.5, 1.5, known)
    held[rng.integers(count, size=known), np.arange(known)] = 1
    weights = torch.zeros(count, len(tokenizer))
    for column, ids in enumerate(words):
        weights[:, ids] = torch.tensor(held[:, column : column + 1] / len(ids), dtype=torch.float32)
    return weights


def train_lm(out: Path, scale: float) -> None:
    """Next-word training on the assistant's words; no picture is ever shown.

    A quarter of the talks have nothing before them: what the model can say there is what is usual, its habits. Before the others
    stands the scene in soft tokens, sums of word embeddings with noise, where an image will stand later. A large language model
    comes with the ability to read what stands between words; this one is too small to get it from text.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    folder = out / "mini-lm"
    save_tokenizer(folder, None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    batch, steps = 32, int(700 * scale)
    optimizer, log = torch.optim.AdamW(parameter_groups(model, 0.05), betas=(0.9, 0.98)), Log(folder, steps, batch)
    for step in range(steps):
        set_rate(optimizer, cosine(step, steps, 2e-3))
        talks, told = [], []
        for i in range(batch):
            scene = sample_scene(rng, habit_share=0.7 if i % 4 == 0 else 0.3)
            talks.append(talk(scene, rng, describe=i % 3 == 0))
            if i % 4 != 0:
                told.append(soft_tokens(scene, rng, tokenizer))
                talks[-1][0]["content"] = f"{'<image>' * len(told[-1])}\n{talks[-1][0]['content']}"
        inputs = tokenizer.apply_chat_template(
            talks, return_dict=True, return_tensors="pt", padding=True, return_assistant_tokens_mask=True
        )
        said = torch.as_tensor(inputs.pop("assistant_masks")) == 1
        labels = inputs["input_ids"].masked_fill(~said, -100)
        embeddings = told_embeddings(model, inputs.pop("input_ids"), told, tokenizer, noise=1.5)
        loss = model(inputs_embeds=embeddings, labels=labels, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log(loss=loss)
    model.half().save_pretrained(folder)


def told_embeddings(
    model: PreTrainedModel, ids: Tensor, told: list[Tensor], tokenizer: PreTrainedTokenizerBase, noise: float = 0.0
) -> Tensor:
    """The embeddings of ids [B, L], with the soft tokens (in order, each [K, V]) at the image tokens.

    Args:
        noise: up to so many standard deviations of the embeddings are added to the soft tokens of each scene.
    """
    table = model.get_input_embeddings().weight  # [>= V, D]
    spread = table.detach().std()
    soft = [x @ table[: x.shape[1]] for x in told]
    soft = [x + torch.randn_like(x) * torch.rand(()) * noise * spread for x in soft]
    places = ids == tokenizer.convert_tokens_to_ids("<image>")
    embeddings = table[ids]
    return embeddings.masked_scatter(places[..., None], torch.cat(soft)) if soft else embeddings
