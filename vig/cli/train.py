"""`mof train` checks everything that can be checked before the first step, then trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from accelerate import PartialState
from transformers import AutoConfig, PreTrainedModel, set_seed

from encoders.command_groups import resumes
from encoders.command_options import Images, Model, Records, TrustRemoteCode, output_option
from encoders.model_cards import HEAD, write_section
from encoders.runs import RunLock
from encoders.saved_models import load_network, load_processor
from encoders.store.fingerprints import weights_digest
from encoders.terminal import say
from mof.data.digests import digest
from vig.positions import most_tokens
from vig.processes import Processes
from vig.saved_models import load_in_4bit, stored_images
from vig.scoring.identity import processor_identity
from vig.training.card import training_facts
from vig.training.finetuning import CHECKPOINTS, DEFAULTS, claim, finetune, finish, result, training_file
from vig.training.preparation import add_lora, freeze_encoder, parse_arguments, read_training_records, require_apart

OWN = {
    "output_dir": "--output",
    "num_train_epochs": "--epochs",
    "learning_rate": "--learning-rate",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulate",
    "bf16": "--bf16",
    "gradient_checkpointing": "--gradient-checkpointing",
    "activation_checkpointing": "--gradient-checkpointing",
}
"""Arguments of `transformers.TrainingArguments` -> their own options here."""


@resumes
def train(
    model: Model,
    records: Records,
    images: Images,
    output: Annotated[Path, output_option("Folder of the trained model. A run that was stopped there is resumed.")],
    eval_records: Annotated[
        Path | None, typer.Option(help="Records to measure the loss on, at every checkpoint and at the end. --records has none of them.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Number of passes over the records.")] = 1.0,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the schedule. Default: 2e-5, with --lora 2e-4.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per forward pass of each GPU.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes per optimizer step.")] = 2,
    lora: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="Train low-rank adapters of the language model only; merged at the end.")
    ] = None,
    in_4bit: Annotated[
        bool,
        typer.Option("--load-in-4bit", help="Hold the language model in 4 bits while --lora trains (QLoRA). The result is a whole model."),
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16. A model in half precision always does.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")] = False,
    padding_free: Annotated[bool, typer.Option("--padding-free", help="Put the records of a batch into one row without padding.")] = False,
    max_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a record. Longer records are cut. Give the number of the scoring run.")
    ] = 2048,
    features: Annotated[Path | None, typer.Option(help="Store of `mof encode --model`, read in place of running the encoders.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Another argument of transformers.TrainingArguments, as weight_decay=0.1. Several."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fine-tune a saved model on records, or on the answer tokens that VIG selected. Its image encoders stay as they are.

    The loss is the mean over all supervised tokens of a step. A run that was stopped goes on from its last checkpoint with the same
    command. A float16 model becomes bfloat16.

    \b
    Example:
      mof train --model runs/mof --records data/selected.json --images data/images --output runs/tuned --bf16
    \b
    A 7B model on one GPU, then on eight:
      mof train --model llava --records data/train.json --images data/images --output runs/tuned --lora 64 --bf16 \\
        --gradient-checkpointing --set save_steps=200 --set report_to=wandb
      torchrun --no-python --nproc_per_node 8 mof train --model llava --records ... (as before)
    \b
    A 7B model on a GPU of 24 GB:
      mof train --model llava --records data/train.json --images data/images --output runs/tuned --lora 64 --load-in-4bit --bf16 \\
        --gradient-checkpointing --batch-size 4 --accumulate 4 --set optim=paged_adamw_8bit
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork after the tokenizer was used
    transformers.utils.logging.disable_progress_bar()  # hides the bars of loading and saving, but not the bar of training
    peak = (2e-4 if lora else 2e-5) if learning_rate is None else learning_rate
    if not (epochs > 0 and peak > 0):
        raise ValueError(f"--epochs and --learning-rate should be above 0, got {epochs} and {peak}")
    if in_4bit and lora is None:
        raise ValueError("--load-in-4bit needs --lora RANK: numbers of 4 bits cannot be trained, but adapters beside them can")
    arguments = {"warmup_steps": 0.03, "num_train_epochs": epochs, "learning_rate": peak, **parse_arguments(more or [], OWN)}
    arguments |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate}
    process = PartialState(cpu=not torch.accelerator.is_available())  # or processes on CPUs would not find each other
    training_file(output).refuse_foreign()  # before the model is loaded
    processor = load_processor(model, trust_remote_code=trust_remote_code)
    room = most_tokens(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code), max_length)
    raw = read_training_records(records, processor, images, room)
    evaluation = None if eval_records is None else read_training_records(eval_records, processor, images, room)
    if evaluation is not None:
        require_apart(raw, evaluation)
        every = arguments.get("save_steps", DEFAULTS["save_steps"])
        arguments = {"eval_strategy": "steps", "eval_steps": every, "per_device_eval_batch_size": batch_size, **arguments}
    elif arguments.get("eval_strategy", "no") != "no":
        raise ValueError(f"--set eval_strategy={arguments['eval_strategy']} needs --eval-records")
    network = load_in_4bit(model, bf16=bf16, trust_remote_code=trust_remote_code) if in_4bit else _load(model, trust_remote_code)
    arguments["bf16"] = bf16 or network.dtype == torch.bfloat16
    options: dict[str, Any] = {"image_folder": images, "max_length": max_length, "padding_free": padding_free}
    options["eval_dataset"] = evaluation
    run = {**arguments, "lora": lora, "max_length": max_length, "processes": process.num_processes, **processor_identity(processor)}
    run |= {name: True for name, given in (("padding_free", padding_free), ("load_in_4bit", in_4bit)) if given}  # absent in older runs
    if evaluation is not None:
        run["eval_records"] = digest(evaluation)
    if features is not None:
        options["stored_images"] = stored_images(network, processor, features)
        run["features"] = options["stored_images"].description
    freeze_encoder(network)
    lock = RunLock(output / CHECKPOINTS, process.process_index)
    try:
        _claim(output, network, raw, run, lock)
        if (facts := result(output)) is not None:
            if process.is_main_process:
                say(f"{output} is done already: {_told(facts)}")
            return
        if lora is not None:
            set_seed(arguments.get("seed", 42))
            network = add_lora(network, lora)
        facts = finetune(
            network,
            processor,
            raw,
            output,
            whole=partial(_load, model, trust_remote_code) if in_4bit else None,
            gradient_checkpointing=gradient_checkpointing,
            trainer_options=options,
            **arguments,
        )
        if process.is_main_process:
            write_section(output, "Training", training_facts(records, len(raw), run, facts), HEAD)
            finish(output, facts)
            say(f"{_told(facts)}; the trained model is in {output}")
    finally:
        lock.release()


def _load(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model on the CPU, a float16 model in bfloat16: autocast refuses to mix the two."""
    model = load_network(folder, trust_remote_code=trust_remote_code)
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.bfloat16()
    return model


def _claim(folder: Path, model: PreTrainedModel, records: Sequence[Any], settings: dict[str, Any], lock: RunLock) -> None:
    """Claim the folder for this run until its processes end. The first process decides; all raise its error."""

    def work() -> None:
        claim(folder, {"model": weights_digest(model), "records": digest(records), **settings}, lock)

    processes = Processes.all()
    processes.on_first(work)
    if processes.rank:
        lock.take()
    processes.close()


def _told(facts: dict[str, Any]) -> str:
    losses = f", loss {facts['losses'][0]:.3f} -> {facts['losses'][-1]:.3f}" if facts["losses"] else ""
    if facts.get("eval_losses"):
        losses += f", evaluation loss {facts['eval_losses'][0]:.3f} -> {facts['eval_losses'][-1]:.3f}"
    left_out = f", {facts['left_out']} times a record left out that cannot be used" if facts["left_out"] else ""
    return f"{facts['steps']} steps on {facts['active_tokens']:,} supervised tokens{losses}{left_out}"
