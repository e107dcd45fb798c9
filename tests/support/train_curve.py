"""Trains the tiny model for a few steps and writes the losses; test_training.py calls it, and runs it as two processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from mof import MoFProcessor
from mof.data.collator import SupervisedCollator
from support.tiny import build_model, build_tokenizer


def records() -> list[dict]:
    """Answers of very different lengths. Two in four records have no image, so that a rank gets batches without any."""
    out = []
    for index in range(24):
        image = {"image": Image.new("RGB", (32, 32), (index * 10, 255 - index * 10, 80))} if index % 4 < 2 else {}
        question = "<image>\nWhich?" if image else "Why?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "so it is " * (index % 5 + 1)}]
        out.append({"id": str(index), "conversations": turns, **image})
    return out


class InOrder(Trainer):
    """Without shuffling: records 4k, 4k+1 have images, 4k+2, 4k+3 have none."""

    def _get_train_sampler(self, *args: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(file: str, per_device_batch: int) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    processor = MoFProcessor.from_parts(model, tokenizer)
    arguments = TrainingArguments(
        output_dir=str(Path(file).parent / "run"),
        per_device_train_batch_size=per_device_batch,
        num_train_epochs=1,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )
    trainer = InOrder(model, arguments, train_dataset=records(), data_collator=SupervisedCollator(processor))
    trainer.train()
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        losses = [entry["loss"] for entry in history if "loss" in entry]
        norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
        weights = [parameter.double().sum().item() for parameter in model.mixer.adapters.parameters()]
        ranks = trainer.args.world_size
        Path(file).write_text(json.dumps({"ranks": ranks, "losses": losses, "norms": norms, "adapters": weights}))
