"""One step of training, written out: the records' gradient one record at a time, and whether weights moved by it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import TrainingArguments

from mof.data.collator import SupervisedCollator

LEARNING_RATE = 0.1


def arguments(folder: Path, **options) -> TrainingArguments:
    quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    sgd = {"optim": "sgd", "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    return TrainingArguments(str(folder), **{**quiet, **sgd, **size, **options})


def masked_records(processor, records, image_folder, last, weights=False):
    """Four records: some tokens chosen at random, none at all in r1; `last` is whole, without an image.

    With `weights` the chosen tokens of r0 and r2 have random weights, and r1 keeps its mask.
    """
    collator = SupervisedCollator(processor, 2048, image_folder)
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for index, record in enumerate(records[:3]):
        count = int((collator([record])["labels"] != -100).sum())
        mask = torch.rand(count, generator=generator) < 0.4
        mask &= index != 1
        weighed = {"token_weights": (mask * 3 * torch.rand(count, generator=generator)).tolist()}
        chosen.append(record | (weighed if weights and index != 1 else {"token_mask": mask.tolist()}))
    return [*chosen, last]


def explicit_gradient(model, processor, records, image_folder):
    """One record at a time: the chosen tokens' losses picked from the full row of losses, weighed, summed, over their number."""
    model = copy.deepcopy(model)
    plain = SupervisedCollator(processor, 2048, image_folder)
    total, count = 0.0, 0
    for record in records:
        batch = plain([{key: value for key, value in record.items() if not key.startswith("token_")}])
        labels = batch.pop("labels")[0, 1:]
        losses = F.cross_entropy(model(**batch).logits[0, :-1], labels, reduction="none")[labels != -100]
        weights = torch.tensor(record.get("token_weights", record.get("token_mask", [True] * len(losses)))).float()
        total, count = total + (losses * weights)[weights > 0].sum(), count + int((weights > 0).sum())
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_step_was(before, after, gradient) -> None:
    """One SGD step: the weights moved by -learning rate * gradient."""
    for name, weight in before.items():
        step = (weight - after[name]) / LEARNING_RATE
        torch.testing.assert_close(step, gradient.get(name, torch.zeros_like(step)), atol=1e-5, rtol=1e-4)
