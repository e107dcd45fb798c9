"""`mof train`: parse arguments, check everything that can be checked before the first step, train."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from accelerate import PartialState
from transformers import AutoModelForImageTextToText, PreTrainedModel, set_seed

from encoders.runs import RunLock
from mof.data.records import digest
from vig.processes import Processes
from vig.saved_models import load_processor, stored_images
from vig.scoring.identity import processor_identity, weights_fingerprint
from vig.training.finetuning import finetune
from vig.training.run_record import CHECKPOINTS, claim, finish, result
from vig.training.trained_parts import add_lora, freeze_encoder
from vig.training.trainer_arguments import parse_arguments
from vig.training.training_records import read_training_records

OWN = {
    "output_dir": "--output-dir",
    "num_train_epochs": "--epochs",
    "learning_rate": "--learning-rate",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulate",
    "bf16": "--bf16",
    "gradient_checkpointing": "--gradient-checkpointing",
    "activation_checkpointing": "--gradient-checkpointing",
}
"""Arguments of the Trainer with an option of their own."""


def train(
    model: Annotated[Path, typer.Option(help="Folder of any saved image-text-to-text model with its processor.")],
    records: Annotated[
        Path, typer.Option(help="Records in LLaVA's form or chat messages, .json or .jsonl, or those that `mof vig select` wrote.")
    ],
    image_folder: Annotated[Path, typer.Option(help="What the records' image paths are relative to.")],
    output_dir: Annotated[Path, typer.Option(help="Where the trained model goes; an interrupted run there is resumed.")],
    epochs: Annotated[float, typer.Option(help="Times to go through the records.")] = 1.0,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the schedule. Default: 2e-5, with --lora 2e-4.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per forward pass of each GPU.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes per optimizer step.")] = 2,
    lora: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="Train low-rank adapters of the language model only; merged at the end.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; by itself for a model in half precision.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")] = False,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens; longer records are cut. That of the scoring run.")] = 2048,
    features: Annotated[Path | None, typer.Option(help="Store of `mof encode --model`: the encoders are then not run.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another of transformers.TrainingArguments, as weight_decay=0.1; several."),
    ] = None,
) -> None:
    """Fine-tune a saved model on records, or on the answer tokens of them that VIG selected. Its image encoders stay as they are.

    The loss is the mean over all supervised tokens of a step. Killed, it goes on from the last checkpoint with the same command.
    A float16 model becomes bfloat16.

    \b
    Example:
      mof train --model runs/mof --records data/selected.json --image-folder data/images --output-dir runs/tuned --bf16
    \b
    A 7B model on one GPU, then on eight:
      mof train --model llava --records data/train.json --image-folder data/images --output-dir runs/tuned --lora 64 --bf16 \\
        --gradient-checkpointing --set save_steps=200 --set report_to=wandb
      torchrun --no-python --nproc_per_node 8 mof train --model llava --records ... (as before)
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork after the tokenizer was used
    transformers.utils.logging.disable_progress_bar()  # of loading and saving weights; that of training stays
    peak = (2e-4 if lora else 2e-5) if learning_rate is None else learning_rate
    if not (epochs > 0 and peak > 0):
        raise ValueError(f"--epochs and --learning-rate should be above 0, got {epochs} and {peak}")
    arguments = {"warmup_steps": 0.03, "num_train_epochs": epochs, "learning_rate": peak, **parse_arguments(more or [], OWN)}
    arguments |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate}
    process = PartialState(cpu=not torch.accelerator.is_available())  # or processes on CPUs would not find each other
    processor = load_processor(model)
    raw = read_training_records(records, processor, image_folder, max_length)
    network = _load(model)
    arguments["bf16"] = bf16 or network.dtype == torch.bfloat16
    options: dict[str, Any] = {"image_folder": image_folder, "max_length": max_length}
    run = {**arguments, "lora": lora, "max_length": max_length, "processes": process.num_processes, **processor_identity(processor)}
    if features is not None:
        options["stored_images"] = stored_images(network, processor, features)
        run["features"] = options["stored_images"].description
    freeze_encoder(network)
    lock = RunLock(output_dir / CHECKPOINTS, process.process_index)
    try:
        _claim(output_dir, network, raw, run, lock)
        if (facts := result(output_dir)) is not None:
            if process.is_main_process:
                typer.echo(f"{output_dir} is done already: {_told(facts)}")
            return
        if lora is not None:
            set_seed(arguments.get("seed", 42))
            network = add_lora(network, lora)
        facts = finetune(
            network, processor, raw, output_dir, gradient_checkpointing=gradient_checkpointing, trainer_options=options, **arguments
        )
        if process.is_main_process:
            finish(output_dir, facts)
            typer.echo(f"{_told(facts)}; the trained model is in {output_dir}")
    finally:
        lock.release()


def _load(folder: Path) -> PreTrainedModel:
    """On the CPU: the trainer knows where it belongs. All of a float16 model as bfloat16, since autocast refuses to mix the two."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.bfloat16()
    return model


def _claim(folder: Path, model: PreTrainedModel, records: Sequence[Any], settings: dict[str, Any], lock: RunLock) -> None:
    """The folder is this run's until its processes end, or refused; one process looks, all raise."""

    def work() -> None:
        claim(folder, {"model": weights_fingerprint(model), "records": digest(records), **settings}, lock)

    processes = Processes.all()
    processes.on_first(work)
    if processes.rank:
        lock.take()
    processes.close()


def _told(facts: dict[str, Any]) -> str:
    losses = f", loss {facts['losses'][0]:.3f} -> {facts['losses'][-1]:.3f}" if facts["losses"] else ""
    left_out = f", {facts['left_out']} times a record left out that cannot be used" if facts["left_out"] else ""
    return f"{facts['steps']} steps on {facts['active_tokens']:,} supervised tokens{losses}{left_out}"
