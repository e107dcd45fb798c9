"""A tiny random LLaVA of transformers' own classes, and records for it: VIG must work with any Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}USER:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT:"
    "{% generation %} {{ message['content'][0]['text'] }}</s>{% endgeneration %}{% endif %}{% endfor %}"
)
TURNS = [
    [("What is it?", "A dog on grass.")],
    [("Which colour?", "Red.")],
    [("How many?", "There are three of them."), ("Are you sure?", "Yes.")],
    [("Describe the picture in one sentence please.", "A small red bus waits in front of a tall grey house.")],
    [("Left or right?", "left"), ("And the other one?", "right, behind the chair"), ("Thanks.", "You are welcome.")],
]


def build_llava(**changes: Any) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """2 layers each, 28-pixel images of 2 x 2 patches; weights large enough that the image matters. `changes` of its config."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text for turns in TURNS for turn in turns for text in turn], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=28, patch_size=14, initializer_range=1.0),
        text_config=LlamaConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.2),
        image_token_id=processor.image_token_id,
        **changes,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model.eval(), processor


def build_records(folder: Path, count: int = 5) -> list[dict[str, Any]]:
    """LLaVA records with images of several sizes on disk; one and more turns."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    records = []
    for index in range(count):
        size = (24 + 8 * (index % 3), 40 - 4 * (index % 2), 3)
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        coarse.resize((size[1], size[0]), Image.Resampling.NEAREST).save(folder / f"{index}.png")
        conversations = []
        for turn, (question, answer) in enumerate(TURNS[index % len(TURNS)]):
            conversations.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
            conversations.append({"from": "gpt", "value": answer})
        records.append({"id": f"r{index}", "image": f"{index}.png", "conversations": conversations})
    return records


def many_records(folder: Path) -> list[dict[str, Any]]:
    """Twelve images, two records on each; one record without an image, and two that cannot be scored."""
    records = build_records(folder, 12)
    again = [record | {"id": record["id"] + "-again"} for record in records]
    text = {"id": "text", "conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]}
    bad = [records[0] | {"id": "missing", "image": "missing.png"}, records[0] | {"id": "empty", "conversations": []}]
    return [*records[:6], text, *again, bad[0], *records[6:], bad[1]]
