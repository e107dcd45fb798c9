"""The tokenizer of mini-clip and mini-lm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mof.chat_templates import VICUNA
from mof.miniature.language import talk, web_caption
from mof.miniature.scenes import sample_scene


def save_tokenizer(folder: Path, template: str | None) -> None:
    """A byte-level BPE of 512 entries at most. `</s>` has the highest id: open_clip's CLIP pools the text there."""
    rng = np.random.default_rng(0)
    talks = [talk(sample_scene(rng, habit_share=0.7), rng, describe=i % 3 == 0) for i in range(3000)]
    corpus = [" ".join(turn["content"] for turn in one) + " USER: ASSISTANT:" for one in talks]
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
