"""mini-lm is trained to predict the next word of text alone, so that it has language habits to overcome. mini-clip shares its tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mof.chat_templates import VICUNA
from mof.miniature.language import facts, talk, web_caption
from mof.miniature.scenes import Scene, sample_scene
from mof.miniature.training.fitting import Log, fit


def save_tokenizer(folder: Path, template: str | None) -> None:
    """Train and write a byte-level BPE of at most 512 entries. `</s>` has the highest id: open_clip's CLIP pools the text there."""
    rng = np.random.default_rng(0)
    talks = [talk(sample_scene(rng, habit_share=0.7), rng, describe=i % 3 == 0) for i in range(3000)]
    corpus = [" ".join(turn["content"] for turn in turns) + " USER: ASSISTANT:" for turns in talks]
    corpus += [web_caption(sample_scene(rng), rng) for _ in range(1000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<image>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=512 - len(special), initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(special)
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=VICUNA,
        extra_special_tokens={"image_token": "<image>"}, model_max_length=512,
    )  # fmt: skip
    wrapped.save_pretrained(folder)


def soft_tokens(scene: Scene, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the scene's facts as 20 to 50 soft tokens [K, V]: the share of each word of the vocabulary in each soft token.

    A fact is in few of them or in many, weak or strong, but always somewhere, like a fact in an image.
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
    """Train mini-lm on the assistant's words, without any picture, and write it to `out`/mini-lm.

    A quarter of the talks have nothing before them: there the model can only learn what is usual, its habits. The other talks
    begin with the scene in soft tokens, sums of word embeddings with noise, where an image will stand later. A large language
    model can read vectors between words from the start; this model is too small to learn this from text.
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

    def draw_losses() -> dict[str, Tensor]:
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
        answers = torch.as_tensor(inputs.pop("assistant_masks")) == 1
        labels = inputs["input_ids"].masked_fill(~answers, -100)
        embeddings = told_embeddings(model, inputs.pop("input_ids"), told, tokenizer, noise=1.5)
        return {"loss": model(inputs_embeds=embeddings, labels=labels, **inputs).loss}

    fit(model, draw_losses, steps=steps, rate=2e-3, decay=0.05, log=Log(folder, steps, batch), largest_gradient=1.0)
    model.half().save_pretrained(folder)


def told_embeddings(
    model: PreTrainedModel, ids: Tensor, told: list[Tensor], tokenizer: PreTrainedTokenizerBase, noise: float = 0.0
) -> Tensor:
    """Return the embeddings of ids [B, L]. Soft tokens [K, V], in their order, take the place of the image tokens.

    Args:
        noise: the soft tokens of each scene get noise of up to this many standard deviations of the embeddings.
    """
    table = model.get_input_embeddings().weight  # [>= V, D]
    spread = table.detach().std()
    soft = [x @ table[: x.shape[1]] for x in told]
    soft = [x + torch.randn_like(x) * torch.rand(()) * noise * spread for x in soft]
    places = ids == tokenizer.convert_tokens_to_ids("<image>")
    embeddings = table[ids]
    return embeddings.masked_scatter(places[..., None], torch.cat(soft)) if soft else embeddings
