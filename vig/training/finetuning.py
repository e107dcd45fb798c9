"""One fine-tuning: from a model in memory to a folder that holds it trained, through checkpoints that a killed run goes on from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments

from vig.training.run_record import CHECKPOINTS
from vig.training.trainer import SelectiveTrainer

DEFAULTS: dict[str, Any] = {
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine",
    "save_steps": 0.1,  # a share of the steps
    "save_total_limit": 1,
    "logging_steps": 0.01,
    "logging_nan_inf_filter": False,  # it hides a loss that is not a number, and waits for the device in every step
    "dataloader_num_workers": min(4, os.cpu_count() or 1),
    "report_to": "none",
}
"""Where these are not `transformers.TrainingArguments`'s own."""


def finetune(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Any],
    folder: Path,
    *,
    gradient_checkpointing: bool = False,
    trainer_options: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train what requires gradient, and save model and processor into `folder`. Goes on from the last checkpoint there.

    What trains does so in float32, with `bf16=True` too, which is autocast: bfloat16 alone would round most updates away. It is
    saved in the types that it was loaded in, with LoRA merged into the weights.

    Args:
        model: as it was loaded, on any device, or with LoRA around it (`vig.training.trained_parts.add_lora`).
        records: what `SelectiveTrainer` trains on, such as `Selection.apply` gives.
        folder: checkpoints go into a folder inside of it.
        gradient_checkpointing: compute activations again in the backward pass; an argument of `TrainingArguments` too, but one
            whose name differs between versions.
        trainer_options: of `SelectiveTrainer`: image_folder, max_length, stored_images, strict, ...
        **arguments: of `transformers.TrainingArguments`, without its output_dir.

    Returns:
        "seconds" in this process, "active_tokens" (how many the loss was taken on), "losses" as logged, "steps", and "left_out":
        how many times all processes left out a record that cannot be used, since they were started.
    """
    lora = not isinstance(model, PreTrainedModel)  # but PEFT's wrapper around one
    own = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    device = {"use_cpu": not torch.accelerator.is_available(), "dataloader_pin_memory": torch.cuda.is_available()}
    shown = {"disable_tqdm": not PartialState().is_local_main_process}
    try:
        args = TrainingArguments(str(folder / CHECKPOINTS), **{**DEFAULTS, **device, **shown, **arguments})
    except ValueError as error:
        raise ValueError(f"transformers.TrainingArguments refuses {arguments}: {error}") from error
    options = {"processing_class": processor, "train_dataset": records, **(trainer_options or {})}
    trainer = SelectiveTrainer(model, args, **options)
    if lora and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("LoRA is merged into whole weights at the end: leave out FSDP and DeepSpeed, or train without LoRA")
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / CHECKPOINTS))
    seconds = time.monotonic() - start
    _save(trainer, processor, own, folder, lora)
    left_out = torch.tensor(trainer.data_collator.left_out, device=args.device)
    return {
        "seconds": seconds,
        "active_tokens": trainer.supervised_tokens,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "steps": trainer.state.global_step,
        "left_out": int(trainer.accelerator.reduce(left_out)),
    }


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written whole: with the trainer's state, the last of its files, and every process's random state."""
    written = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    whole = [path for path in written if len(list(path.glob("rng_state*.pth"))) >= PartialState().num_processes]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _save(trainer: SelectiveTrainer, processor: ProcessorMixin, dtypes: Mapping[str, torch.dtype], folder: Path, lora: bool) -> None:
    """Whole weights in the types that they had when they were loaded."""
    process = PartialState()
    if lora:
        whole = trainer.model.merge_and_unload()
        if process.is_main_process:
            whole.save_pretrained(folder)
    elif trainer.is_fsdp_enabled:  # shards cannot change type, and save_model writes nothing where checkpoints stay in shards
        state = trainer.accelerator.get_state_dict(trainer.model)  # on the main process
        if process.is_main_process:
            trainer._save(str(folder), {name: value.to(dtypes.get(name, value.dtype)) for name, value in state.items()})
    else:
        for name, parameter in trainer.model.named_parameters():  # not model.to(), which would round the rotary frequencies as well
            parameter.data = parameter.data.to(dtypes[name])
        trainer.save_model(str(folder))
    if process.is_main_process:
        processor.save_pretrained(folder)
    process.wait_for_everyone()
