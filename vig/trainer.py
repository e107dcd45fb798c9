"""The transformers Trainer with a loss on the selected tokens only, right under accumulation and on several ranks."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback, TrainingArguments
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_callback import ExportableState

from mof.supervision import SupervisedCollator

# Shapes: B = records in a batch, S = padded length, V = vocabulary.


def supervised_loss(outputs: CausalLMOutputWithPast, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Sum of the cross-entropy over the supervised tokens, divided by their number in the whole optimizer step.

    Args:
        outputs: of any model, with logits [B, S, V].
        labels: [B, S], -100 for a token without loss. A batch without any supervised token has loss 0 and gradient 0.
        num_items_in_batch: supervised tokens over all accumulated batches and ranks; None counts those of `labels`.
    """
    assert outputs.logits is not None
    logits = outputs.logits.float()  # [B, S, V]
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].to(logits.device)  # [B, S]: position t predicts token t + 1
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


class _Count(TrainerCallback, ExportableState):
    """Supervised tokens so far; a callback because those are saved with checkpoints and restored from them."""

    def __init__(self) -> None:
        self.tokens: Tensor | int = 0  # added up where the batches are, so that no step waits for the device

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"tokens": int(self.tokens)}}


class SelectiveTrainer(Trainer):
    """Trains any image-text-to-text model on records whose "token_mask" says which answer tokens count.

    Every gradient is that of the sum of the supervised tokens' losses divided by their number over all ranks and
    accumulated batches, so neither how records fall into batches nor how many of their tokens were selected weighs in.
    The model's own loss is not used: it may be a mean per batch, and it is NaN for a batch without supervised tokens.

    Args:
        model: any image-text-to-text model of transformers, or a PEFT model around one.
        args: the training arguments; a copy is used, with `remove_unused_columns=False`: a record is no model input.
        processing_class: the model's processor; records become batches by `mof.supervision.SupervisedCollator`.
        image_folder: what relative image paths are relative to.
        max_length: tokens; must be that of the scoring run.
        **options: of `transformers.Trainer`; train_dataset and eval_dataset are lists of records.

    Raises:
        ValueError: for arguments under which the loss would not be normalised as said.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        processing_class: ProcessorMixin,
        image_folder: str | os.PathLike[str] | None = None,
        max_length: int = 2048,
        **options: Any,
    ) -> None:
        args = copy.copy(args)
        args.remove_unused_columns = False
        args.restore_callback_states_from_checkpoint = True
        if not args.average_tokens_across_devices:
            raise ValueError("the loss counts tokens over all ranks; leave average_tokens_across_devices=True")
        if args.label_smoothing_factor:
            raise ValueError(f"label smoothing is not supported; got {args.label_smoothing_factor}, expected 0")
        if options.get("data_collator") is None:
            options["data_collator"] = SupervisedCollator(processing_class, max_length, image_folder)
        super().__init__(model, args, processing_class=processing_class, compute_loss_func=supervised_loss, **options)
        self.add_callback(_Count())
        if self.args.n_gpu > 1:  # known only now: a model spread over several GPUs is another matter
            raise ValueError(f"{self.args.n_gpu} GPUs in one process would use DataParallel; start with torchrun")

    @property
    def supervised_tokens(self) -> int:
        """How many tokens the loss was taken on so far, over all ranks: a training's active tokens."""
        return int(self._count.tokens)

    @property
    def _count(self) -> _Count:  # looked up, since resuming replaces it
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, _Count))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        self._count.tokens = self._count.tokens + (0 if tokens is None else tokens)
        return batches, tokens

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer saves some models (LLaVA, Qwen-VL, mixtures of experts) under the names of their public weights,
        # but looks for the names in memory when it resumes, finds none and goes on (transformers issue 48805).
        target = self.model if model is None else model
        plain = target if isinstance(target, PreTrainedModel) and not self.is_fsdp_enabled else None
        if plain is not None and get_model_conversion_mapping(plain, add_legacy=False):
            plain.load_state_dict(type(plain).from_pretrained(resume_from_checkpoint).state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
