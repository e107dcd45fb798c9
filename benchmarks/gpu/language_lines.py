"""VIG scoring, a training step and generation with random models: two encoders, 1,152 visual tokens, and a language model's real shape."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from encoder_lines import ENCODERS, TINY
from measure import Bench, Figure, operations
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from encoders import build_encoder
from mof.adapter import InterleavedMoF
from mof.config import MoFConfig
from mof.data.answer_tokens import Example
from mof.data.collator import collate
from mof.model import MoFForConditionalGeneration
from vig import SelectiveTrainer
from vig.scoring.answer_losses import AnswerLosses
from vig.scoring.batches import Batch, make_batches
from vig.scoring.pairs import Pair

SHAPES: dict[str, dict[str, Any]] = {  # Llama 3.2 1B and Llama 2 7B
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
SMALL: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "7B": {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
}
VOCABULARIES = {"32k": 32_000, "128k": 128_256}
IMAGE_TOKEN, SYSTEM, TEXT = 5, 35, (90, 150)
"""Tokens before the image, and of question and answer together."""
ANSWERS, SELECTED = 0.12, 0.045
"""Shares of answer tokens, and of tokens with a loss, among a record's tokens."""


Key = tuple[str, int]
_built: dict[Key, MoFForConditionalGeneration] = {}


def model_of(bench: Bench, shape: str, vocabulary: int) -> MoFForConditionalGeneration:
    """Return the model of this shape. The model of the lines before makes room first."""
    if (shape, vocabulary) not in _built:
        _built.clear()
        gc.collect()
        _built[shape, vocabulary] = build_model(shape, vocabulary, bench.device, bench.tiny)
    return _built[shape, vocabulary]


def build_model(shape: str, vocabulary: int, device: torch.device, tiny: bool) -> MoFForConditionalGeneration:
    """Return CLIP ViT-L/14-336 and DINOv2 ViT-L/14-336, interleaved, before a Llama of this shape, all random and in bfloat16."""
    torch.manual_seed(0)
    sizes = SMALL[shape] if tiny else SHAPES[shape]
    config = LlamaConfig(**sizes, vocab_size=512 if tiny else vocabulary, max_position_embeddings=4096, use_cache=True)
    chosen = [(TINY if tiny else ENCODERS)[name] for name in ("CLIP ViT-L/14-336", "DINOv2 ViT-L/14-336")]
    with torch.device(device):  # random numbers are drawn there, which takes a second instead of minutes
        encoders = {name: build_encoder(**options, pretrained=False) for name, options in zip(("clip", "dinov2"), chosen, strict=True)}
        mixer = InterleavedMoF(encoders, config.hidden_size)
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        whole = MoFConfig(config, image_token_id=IMAGE_TOKEN, **mixer.spec)
        model = MoFForConditionalGeneration(whole, mixer, llm)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, suppress_tokens=[IMAGE_TOKEN])
    return model.to(device).eval()


def examples(model: MoFForConditionalGeneration, images: int, records: int, seed: int = 0) -> list[list[Example]]:
    """Return the records of each image, as tokens and pixels."""
    rng, side = np.random.default_rng(seed), model.mixer.image_size
    system = rng.integers(10, model.config.vocab_size, SYSTEM).tolist()
    made: list[list[Example]] = []
    for image in range(images):
        pixels = torch.from_numpy(rng.integers(0, 256, (1, 3, side, side), dtype=np.uint8))
        made.append([])
        for index in range(records):
            text = rng.integers(10, model.config.vocab_size, int(rng.integers(*TEXT))).tolist()
            ids = torch.tensor([*system, *[IMAGE_TOKEN] * model.mixer.tokens_per_image, *text])
            mask = torch.arange(len(ids)) >= len(ids) - min(round(ANSWERS * len(ids)), len(text) - 1)
            made[-1].append(Example(f"{image}-{index}", ids, mask, {"pixel_values": pixels}))
    return made


# Scoring


def add_scoring_lines(bench: Bench) -> None:
    for shape in SHAPES:
        for short, vocabulary in VOCABULARIES.items():
            for name, way in (("two plain forwards", plainly), ("vig.score", as_scored)):
                bench.add(f"{shape}, vocabulary {short}, {name}", partial(_scored, bench, shape, vocabulary, way))


def _scored(bench: Bench, shape: str, vocabulary: int, way: Callable[..., Tensor]) -> Figure:
    model = model_of(bench, shape, vocabulary)
    images, each = (2, 2) if bench.tiny else (8, 3)
    clean, null = (examples(model, images, each, seed=0), examples(model, images, each, seed=0))
    for group in null:  # other pixels
        for example in group:
            example.images["pixel_values"] = 255 - example.images["pixel_values"]
    start = SYSTEM + model.mixer.tokens_per_image
    pairs = [
        Pair(a.id, "", a, b, np.array([], dtype=np.int64), a.id.split("-")[0], start)
        for groups in zip(clean, null, strict=True)
        for a, b in zip(*groups, strict=True)
    ]
    losses = AnswerLosses(model, 0)
    as_scored(model, losses, pairs[:each])  # the first batches are compared with a plain pass
    as_scored(model, losses, pairs[:1])
    work = operations(lambda: way(model, losses, pairs))
    rate = len(pairs) / bench.seconds(lambda: way(model, losses, pairs))
    tokens = sum(len(pair.clean.input_ids) for pair in pairs) / len(pairs)
    note = f"{len(pairs)} records of {tokens:.0f} tokens on {images} images, read before"
    return Figure(rate, "records/s", rate * work / len(pairs), note=note)


@torch.inference_mode()
def plainly(model: MoFForConditionalGeneration, losses: AnswerLosses, pairs: list[Pair], size: int = 8) -> Tensor:
    """Return the VIG of every answer token, from two forward passes a batch with the logits of all positions."""
    vigs = []
    for start in range(0, len(pairs), size):
        taken, both = pairs[start : start + size], []
        for branch in ([pair.clean for pair in taken], [pair.null for pair in taken]):
            batch = {name: value.to(model.device) for name, value in collate(branch, 0).items()}
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            both.append(F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[labels != -100])
        vigs.append(both[1] - both[0])
    return torch.cat(vigs).cpu()


def as_scored(model: MoFForConditionalGeneration, losses: AnswerLosses, pairs: list[Pair]) -> Tensor:
    """Return the VIG of every answer token, computed as in `vig.score`."""
    vigs = []
    for batch in make_batches(pairs, 16384, 64):
        clean, null = (losses(branch, batch.prefix) for branch in _branches(batch))
        vigs.append(null - clean)
    return torch.cat(vigs).cpu()


def _branches(batch: Batch) -> tuple[list[list[Example]], list[list[Example]]]:
    return [[pair.clean for pair in group] for group in batch.groups], [[pair.null for pair in group] for group in batch.groups]


# Training


def add_training_lines(bench: Bench) -> None:
    for shape in SHAPES:
        for short, vocabulary in VOCABULARIES.items():
            for kind in (Trainer, SelectiveTrainer):
                name = f"{shape}, vocabulary {short}, {kind.__name__}"
                bench.add(name, partial(_trained, bench, shape, vocabulary, kind))


class Processor:
    """Processor does nothing. SelectiveTrainer needs a processor, but the records here are tokens already."""


def _trained(bench: Bench, shape: str, vocabulary: int, kind: type[Trainer]) -> Figure:
    """Time a step: of the 1B shape with float32 weights, autocast and AdamW; of the 7B shape forward and backward alone, in bfloat16."""
    model, whole = build_model(shape, vocabulary, bench.device, bench.tiny), shape == "1B"  # for this line only, because it changes
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if whole:
        for parameter in trained:
            parameter.data = parameter.data.float()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the name of older versions
    enable({"use_reentrant": False})
    batch = _training_batch(model, 2 if bench.tiny else 8, bench.device)
    trainer = _trainer(kind, model, bench, bf16=whole)
    prepared = trainer.accelerator.prepare_model(model)  # under autocast, if bf16 is given
    optimizer = trainer.create_optimizer() if whole else None
    count = (batch["labels"] != -100).sum()
    model.train()

    def step() -> None:
        trainer.training_step(prepared, dict(batch), count)
        if optimizer is None:
            model.zero_grad()
        else:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    step()  # makes the optimizer's state, and SelectiveTrainer looks at the model
    work = operations(step)
    seconds = bench.seconds(step)
    records, length = batch["input_ids"].shape
    note = f"{records} x {length} tokens, {int(count)} with a loss, layers checkpointed; "
    note += "float32 weights, autocast, AdamW" if whole else "bfloat16, without optimizer: its state needs several GPUs"
    return Figure(records * length / seconds, "tokens/s", work / seconds, note=note)


def _trainer(kind: type[Trainer], model: MoFForConditionalGeneration, bench: Bench, *, bf16: bool) -> Trainer:
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    arguments = TrainingArguments(
        str(bench.scratch / "trainer"), remove_unused_columns=False, bf16=bf16, use_cpu=bench.device.type == "cpu", **quiet
    )
    options: dict[str, Any] = {"processing_class": Processor()} if kind is SelectiveTrainer else {}
    trainer = kind(model=model, args=arguments, train_dataset=[{}], data_collator=lambda records: records, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_batch(model: MoFForConditionalGeneration, records: int, device: torch.device) -> dict[str, Tensor]:
    made = [group[0] for group in examples(model, records, 1)]
    generator = torch.Generator().manual_seed(0)
    keep = []
    for example in made:
        places = example.answer_mask.nonzero().flatten()
        chosen = places[torch.randperm(len(places), generator=generator)[: max(round(SELECTED * len(example.input_ids)), 1)]]
        keep.append(torch.zeros_like(example.answer_mask).index_fill(0, chosen, True))
    return {name: value.to(device) for name, value in collate(made, 0, keep=keep).items()}


# Generation


def add_generation_lines(bench: Bench) -> None:
    for shape in SHAPES:
        for prompts in (1, 16):
            bench.add(f"{shape}, {prompts} prompt{'s' if prompts > 1 else ''} at a time", partial(_generated, bench, shape, prompts))


@torch.inference_mode()
def _generated(bench: Bench, shape: str, prompts: int) -> Figure:
    model, tokens = model_of(bench, shape, VOCABULARIES["32k"]), 4 if bench.tiny else 32
    made = [group[0] for group in examples(model, prompts, 1)]
    length = SYSTEM + model.mixer.tokens_per_image + 40
    ids = torch.stack([example.input_ids[:length] for example in made]).to(bench.device)
    pixels = torch.cat([example.images["pixel_values"] for example in made]).to(bench.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "do_sample": False}
    first, all_of_them = (bench.seconds(lambda n=n: model.generate(**inputs, max_new_tokens=n), most=1) for n in (1, 1 + tokens))
    each = max(all_of_them - first, 1e-9) / tokens
    weights = sum(parameter.nbytes for parameter in model.language_model.parameters())
    note = f"prompts of {length} tokens take {1000 * first:.0f} ms; the share is of the reading of all weights for each token"
    return Figure(prompts / each, "tokens/s", weights / each, "bandwidth", note)
