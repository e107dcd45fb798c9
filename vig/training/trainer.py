"""The transformers Trainer with a loss on the selected tokens only, right under accumulation and on several ranks."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback, TrainingArguments
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_callback import ExportableState

from encoders import StoredImages
from mof.data.collator import SupervisedCollator
from vig.training.padding_free import PaddingFreeCollator, keeps_records_apart
from vig.training.supervised_loss import SupervisedPass, is_untouched


class _Count(TrainerCallback, ExportableState):
    """Supervised tokens so far; a callback because those are saved with checkpoints and restored from them."""

    def __init__(self) -> None:
        self.tokens: Tensor | int = 0  # added up where the batches are, so that no step waits for the device

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"tokens": int(self.tokens)}}


class SelectiveTrainer(Trainer):
    """Trains any image-text-to-text model on records whose "token_mask" or "token_weights" say which answer tokens count.

    Every gradient is that of the sum of the supervised tokens' losses divided by their number over all ranks and
    accumulated batches, so neither how records fall into batches nor how many of their tokens were selected weighs in.
    Token weights are factors in that sum and leave the number as it is, that of the tokens with a weight above 0: a step
    on tokens of little weight is a small step. Let them be 1 on average, as a selection makes them.

    The output head works at the supervised positions only (`vig.training.supervised_loss`). The model's own loss is not used: it
    takes all logits, may be a mean per batch, and is NaN for a batch without supervised tokens.

    Runs on several processes as they are, under FSDP2 and under DeepSpeed's ZeRO-2 and ZeRO-3 (recipes/configs/launch). Freeze
    what gets no gradient, as the last layers of LLaVA's vision tower: FSDP2 refuses to resume its optimizer otherwise.

    Args:
        model: any image-text-to-text model of transformers, or a PEFT model around one.
        args: the training arguments; a copy is used, with `remove_unused_columns=False`: a record is no model input.
        processing_class: the model's processor; records become batches by `mof.data.collator.SupervisedCollator`.
        image_folder: what relative image paths are relative to.
        max_length: tokens; must be that of the scoring run.
        stored_images: train on features out of a store instead of running the encoders (`mof encode --model`).
        strict: end at the first image that cannot be used, where otherwise its record is logged, counted and left out.
        padding_free: put the records of a batch into one row, without padding. Of models that cannot tell them apart there the
            first batch is refused.
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
        stored_images: StoredImages | None = None,
        strict: bool = False,
        padding_free: bool = False,
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
            options["data_collator"] = SupervisedCollator(processing_class, max_length, image_folder, stored_images, strict)
        if padding_free:
            options["data_collator"] = PaddingFreeCollator(options["data_collator"])
        self._padding_free = padding_free
        super().__init__(model, args, processing_class=processing_class, compute_loss_func=self._loss, **options)
        self.add_callback(_Count())
        self._head_is_last: bool | None = None  # whether the head's output is the logits; known from the first batch
        self._wants_logits = False
        if self._head() is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: expected a model that predicts tokens")
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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # resumed from the last step: transformers would do one more
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in transformers, but the output head sees the supervised positions only, so the outputs hold no logits to use."""
        inputs = dict(inputs)
        if self._padding_free:
            inputs["use_cache"] = False  # with a cache, positions do not bound records
        self._pass = SupervisedPass(inputs["labels"], inputs.pop("token_weights", None), num_items_in_batch)
        if self._wants_logits:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._head_is_last is None:
            self._head_is_last = self._examine(model, {name: value for name, value in inputs.items() if name != "labels"})
        with self._pass.at(self._head(), untouched=self._head_is_last):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _examine(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """What `is_untouched` says. ValueError for a model that reads on from record to record in a padding-free batch."""
        if self._padding_free and not keeps_records_apart(model, self._head(), inputs):
            raise ValueError(
                f"{type(self.model).__name__} does not keep the records of a padding-free batch apart, at least not with "
                "this attention implementation; leave padding_free=False"
            )
        return is_untouched(model, self._head(), inputs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        self._wants_logits = not prediction_loss_only  # predict(), and evaluate() with metrics to compute
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._wants_logits = False

    def _loss(self, outputs: CausalLMOutputWithPast, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        return self._pass.loss(outputs.logits)

    def _head(self) -> nn.Module:  # looked up, since adding tokens or adapters replaces it
        return self.model.get_output_embeddings()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer saves some models (LLaVA, Qwen-VL, mixtures of experts) under the names of their public weights,
        # but looks for the names in memory when it resumes, finds none and goes on (transformers issue 48805).
        target = self.model if model is None else model
        plain = target if isinstance(target, PreTrainedModel) and not self.is_fsdp_enabled else None
        if plain is not None and get_model_conversion_mapping(plain, add_legacy=False):
            # float32, as what trains may be so while the checkpoint's config names the type of the rest; loading casts back
            plain.load_state_dict(type(plain).from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
