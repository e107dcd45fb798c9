"""`finetune` trains a model in memory, and saves it into a folder. A killed run goes on from the last checkpoint there."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin, ProgressCallback, TrainingArguments

from encoders.runs import RunFile, RunLock
from encoders.whole_files import remove_unfinished
from vig.training.checkpoints import last_checkpoint, writing
from vig.training.divergence import DivergenceError, not_finite
from vig.training.trainer import SelectiveTrainer

CHECKPOINTS = "checkpoints"
FORMAT = 1  # version of everything in the folder

DEFAULTS: dict[str, Any] = {
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine",
    "save_steps": 0.1,  # as a share of the steps
    "save_total_limit": 2,  # the earlier checkpoint is needed if the last is damaged
    "logging_steps": 0.01,
    "logging_nan_inf_filter": False,  # this filter hides a loss that is not a number, and waits for the device in every step
    "dataloader_num_workers": min(4, os.cpu_count() or 1),
    "report_to": "none",
}
"""Arguments whose defaults differ from the defaults of `transformers.TrainingArguments`."""

ON_GPU: dict[str, Any] = {
    "optim": "adamw_torch_fused",
    "dataloader_pin_memory": True,
    "accelerator_config": {"non_blocking": True},  # batches travel from pinned memory while the device works
}
"""Further defaults where there is a GPU. On a CPU, fused AdamW rounds in another way, so that earlier results would change."""

MAKERS = ("create_optimizer", "create_scheduler")
"""Functions of transformers that follow the user's arguments."""


def finetune(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Any],
    folder: Path,
    *,
    whole: Callable[[], PreTrainedModel] | None = None,
    gradient_checkpointing: bool = False,
    trainer_options: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train the weights that require a gradient, and save model and processor into `folder`. A killed run goes on from its last checkpoint.

    If the last checkpoint is damaged, a warning says so, and the run goes on from the checkpoint before it.

    These weights train in float32, also with `bf16=True`, which is autocast: in bfloat16 most updates would be rounded away. They
    are saved in the types in which they were loaded, and LoRA is merged into them.

    Args:
        model: as it was loaded, on any device, or with LoRA around it (`vig.training.preparation.add_lora`).
        records: the records that `SelectiveTrainer` trains on, for example from `Selection.apply`.
        folder: it gets the trained model, and checkpoints in a folder inside of it.
        whole: for LoRA on a model in 4 bits: loads the model in whole numbers, on any device. LoRA is merged into this model at the end.
        gradient_checkpointing: compute activations again in the backward pass. `TrainingArguments` has this too, but under a name
            that differs between versions.
        trainer_options: options of `SelectiveTrainer`: image_folder, max_length, stored_images, strict, padding_free, ...
        **arguments: of `transformers.TrainingArguments`, without its output_dir.

    Returns:
        A dict with "seconds" in this process, "active_tokens" (the number of tokens that had a loss), "losses" as logged, "eval_losses"
        on an `eval_dataset`, "steps", and "left_out": the number of times that the processes together left out a record that cannot be
        used, since they were started.

    Raises:
        DivergenceError: for a training with a loss, a gradient or a weight that is not finite. No model is saved then.
        OSError: when the folder cannot be written, naming it.
    """
    lora = not isinstance(model, PreTrainedModel)  # but PEFT's wrapper around a model
    own = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    device: dict[str, Any] = {"use_cpu": not torch.accelerator.is_available(), "dataloader_pin_memory": False}
    if torch.cuda.is_available():
        device |= ON_GPU
    shown = {"disable_tqdm": not PartialState().is_local_main_process}
    try:
        args = TrainingArguments(str(folder / CHECKPOINTS), **{**DEFAULTS, **device, **shown, **arguments})
    except (ValueError, ImportError) as error:
        raise ValueError(f"transformers.TrainingArguments refuses {arguments}: {error}") from error
    options = {"processing_class": processor, "train_dataset": records, **(trainer_options or {})}
    with _refusing_arguments():
        trainer = SelectiveTrainer(model, args, **options)
    if lora and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("LoRA is merged into whole weights at the end: leave out FSDP and DeepSpeed, or train without LoRA")
    start = time.monotonic()
    with _refusing_arguments(), _ended_bar(trainer):
        trainer.train(resume_from_checkpoint=last_checkpoint(folder / CHECKPOINTS))
    seconds = time.monotonic() - start
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    with writing(folder):
        _save(trainer, processor, own, folder, lora, whole)
    left_out = torch.tensor(trainer.data_collator.left_out, device=args.device)
    return {
        "seconds": seconds,
        "active_tokens": trainer.supervised_tokens,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "steps": trainer.state.global_step,
        "left_out": int(trainer.accelerator.reduce(left_out)),
    }


@contextmanager
def _ended_bar(trainer: SelectiveTrainer) -> Iterator[None]:
    """End the line of the progress bar at an error, so that its message has a line of its own."""
    try:
        yield
    except BaseException:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()
        raise


@contextmanager
def _refusing_arguments() -> Iterator[None]:
    """Raise a ValueError that the user can mend where an argument needs a missing package, or makes no optimizer or schedule."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"an argument of the training needs a package that is not installed: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        if not any(frame.f_code.co_name in MAKERS for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        raise ValueError(f"an argument of the training, such as optim, optim_args or lr_scheduler_kwargs, is refused: {error}") from error


def claim(folder: Path, identity: Mapping[str, Any], lock: RunLock) -> None:
    """Give `folder` to the training with this identity, or go on with that training. The lock in the folder of checkpoints is then held.

    A training without a checkpoint, for example because its settings were refused, is replaced by any other training.

    Raises:
        ValueError: for a folder with another training (naming the differences) or other files, or while a training is alive in it.
    """
    run, checkpoints = training_file(folder), folder / CHECKPOINTS
    run.refuse_foreign()
    lock.take()
    remove_unfinished(folder)
    begun = any(checkpoints.glob("checkpoint-*")) or (run.path.is_file() and result(folder) is not None)
    run.claim(identity, begun=begun)


def result(folder: Path) -> dict[str, Any] | None:
    """Return the facts that `finish` was given, or None for a training that is not done."""
    return training_file(folder).read().get("result")


def finish(folder: Path, facts: Mapping[str, Any]) -> None:
    """Mark the training as done; this is the last file that it writes."""
    run = training_file(folder)
    run.write(run.read()["identity"], result=dict(facts))


def training_file(folder: Path) -> RunFile:
    """Return the file with the identity of the training in a folder, and its result."""
    return RunFile(folder / "training.json", "training", FORMAT, "give the same command to go on with it, or a new --output")


def _save(
    trainer: SelectiveTrainer,
    processor: ProcessorMixin,
    dtypes: Mapping[str, torch.dtype],
    folder: Path,
    lora: bool,
    whole: Callable[[], PreTrainedModel] | None,
) -> None:
    """Save whole weights, in the types that they had when they were loaded."""
    process = PartialState()
    if lora:
        if process.is_main_process:
            adapted = trainer.model if whole is None else _moved(trainer.model, whole())
            merged = adapted.merge_and_unload()
            _require_finite(merged.named_parameters())
            merged.save_pretrained(folder)
    elif trainer.is_fsdp_enabled:  # shards cannot change type, and save_model writes nothing where checkpoints stay in shards
        state = trainer.accelerator.get_state_dict(trainer.model)  # on the main process
        if process.is_main_process:
            cast = {name: value.to(dtypes.get(name, value.dtype)) for name, value in state.items()}
            _require_finite(cast.items())
            trainer._save(str(folder), cast)
    else:
        for name, parameter in trainer.model.named_parameters():  # not model.to(), which would round the rotary frequencies as well
            parameter.data = parameter.data.to(dtypes[name])
        _require_finite(trainer.model.named_parameters())
        trainer.save_model(str(folder))
    if process.is_main_process:
        processor.save_pretrained(folder)
    process.wait_for_everyone()


def _moved(adapted: Any, model: PreTrainedModel) -> Any:
    """Return `model` with the low-rank adapters that the model `adapted` has."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    moved = get_peft_model(model, adapted.active_peft_config)
    set_peft_model_state_dict(moved, get_peft_model_state_dict(adapted))
    return moved


def _require_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    if bad := not_finite(weights):
        raise DivergenceError(f"{len(bad)} trained weights are too large for their type, the first is {bad[0]}; no model is saved")
