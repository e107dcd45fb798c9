"""SelectiveTrainer is a Trainer of transformers whose loss is on the selected tokens only. It is exact on several ranks, too."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, TrainingArguments
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from encoders import StoredImages
from encoders.images.reading import ImageError
from mof.data.collator import SupervisedCollator
from mof.data.records import RecordError, require_unchanged
from vig.output_head import IGNORED, HeadPass, is_untouched
from vig.training.divergence import RECORD_IDS, DivergenceError, WatchedTrainer, named
from vig.training.lengths import estimated_length
from vig.training.padding_free import PaddingFreeCollator, keeps_records_apart, record_rows

# Shapes: B = records in a batch, S = padded length, N = supervised positions of the batch.


class SupervisedPass(HeadPass):
    """SupervisedPass is a forward pass with its loss: the sum of weight * cross-entropy over the supervised tokens, divided by `count`.

    Args:
        labels: [B, S], -100 for a token without loss. A batch of nothing else has loss 0 and gradient 0.
        weights: [B, S], a factor for the loss of each token; None for 1.
        count: the divisor of the sum; None for the number of supervised tokens in `labels`.
    """

    def __init__(self, labels: Tensor, weights: Tensor | None = None, count: Tensor | int | None = None) -> None:
        super().__init__(labels)
        self._divisor = self.count if count is None else count
        self._weights = None if weights is None else F.pad(weights[:, 1:], (0, 1)).flatten()[self.positions]  # [N]

    def reduce(self, losses: Tensor) -> Tensor:
        """Return the loss of the batch, a float32 scalar, from the losses of its supervised tokens [N]."""
        weighted = losses if self._weights is None else losses * self._weights.to(losses)  # [N]
        total = weighted.sum()
        self.total = total.detach()
        """The sum before it is divided."""
        return total / torch.as_tensor(self._divisor, device=losses.device).clamp(min=1)


class _Count(TrainerCallback, ExportableState):
    """_Count is the number of supervised tokens so far. It is a callback, because checkpoints save and restore the state of callbacks."""

    def __init__(self) -> None:
        self.tokens: Tensor | int = 0  # added up where the batches are, so that no step waits for the device

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"tokens": int(self.tokens)}}


class SelectiveTrainer(WatchedTrainer):
    """SelectiveTrainer trains any image-text-to-text model on records whose "token_mask" or "token_weights" say which answer tokens count.

    A step follows the gradient of the sum of the supervised tokens' losses, divided by the number of supervised tokens over all
    ranks and accumulated batches. So the result does not depend on the division of the records into batches, or on their lengths.
    Token weights are factors in this sum. They do not change the number that divides it, which counts the tokens with a weight
    above 0: a step on tokens with small weights is a small step. The weights should be 1 on average, as `Selection.weighted`
    makes them. The loss of an evaluation is divided in the same way, by the number of supervised tokens of all its records.

    A loss, gradient or weight that is not finite ends the training or the evaluation with a `DivergenceError`, which names the step
    and the records. Only finite weights are saved, so the last checkpoint is good.

    The output head works at the supervised positions only (`vig.output_head`). The model's own loss is not used: it takes all
    logits, may be a mean per batch, and is NaN for a batch without supervised tokens.

    It runs unchanged on several processes, under FSDP2 and under DeepSpeed's ZeRO-2 and ZeRO-3 (recipes/configs/launch). Freeze
    every part that gets no gradient, such as the last layers of LLaVA's vision tower: otherwise FSDP2 cannot resume its optimizer.

    Args:
        model: any image-text-to-text model of transformers, or a PEFT model around it.
        args: the training arguments. The trainer uses a copy with `remove_unused_columns=False`, as a record is no model input.
        processing_class: the model's processor; `mof.data.collator.SupervisedCollator` makes batches of records with it.
        image_folder: relative image paths start here.
        max_length: tokens; it must be the same as in the scoring run.
        stored_images: train on features out of a store instead of running the encoders (`mof encode --model`).
        strict: stop at the first image that cannot be used. By default its record is logged, counted and left out.
        padding_free: put the records of a batch into one row, without padding. The first batch is refused if the model does not
            keep the records of such a row apart.
        **options: arguments of `transformers.Trainer`; train_dataset and eval_dataset are lists of records.

    Raises:
        ValueError: for arguments under which the loss would not be divided as described; while it trains, when no record of an epoch
            can be used, with the first reason.
        RecordError: for a record in a list that was changed after it was selected.
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
        for data in (self.train_dataset, self.eval_dataset):
            for record in data if isinstance(data, list) else ():
                require_unchanged(record)
        self._untouched: bool | None = None  # whether the logits are the head's output as it is; known from the first batch
        self._wants_logits = False
        self._evaluated: list[tuple[Sequence[str], Tensor, int]] = []  # records, loss sum and supervised tokens of each batch
        if self._head() is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: expected a model that predicts tokens")
        if self.args.n_gpu > 1:  # known only now; a model that is spread over several GPUs has n_gpu = 1
            raise ValueError(f"{self.args.n_gpu} GPUs in one process would use DataParallel; start with torchrun")

    @property
    def supervised_tokens(self) -> int:
        """Return the number of tokens that had a loss so far, over all ranks: the active tokens of a training."""
        return int(self._count.tokens)

    @property
    def _count(self) -> _Count:  # looked up, since resuming replaces it
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, _Count))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        self._count.tokens = self._count.tokens + (0 if tokens is None else tokens)
        return batches, tokens

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # resumed from the last step: transformers would do another step
            self.control.should_training_stop = True
            return None
        result = super()._run_epoch(*args, **kwargs)
        if not self.supervised_tokens:
            self._refuse_unusable_records()
        return result

    def _refuse_unusable_records(self) -> None:
        """Raise the error of the first record that cannot be used if an epoch had no supervised token."""
        collator = copy.copy(getattr(self.data_collator, "collator", self.data_collator))
        collator.strict = True
        for record in self.train_dataset:
            try:
                collator([record])
            except (ImageError, RecordError) as error:
                raise ValueError(f"no record can be trained on; the first reason: {error}") from error

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(self._with_lengths(self.train_dataset if train_dataset is None else train_dataset))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return super()._get_eval_sampler(self._with_lengths(eval_dataset))

    def _with_lengths(self, dataset: Any) -> Any:
        """Return the data set; for samplers that go by length, stand-ins with inputs of each record's estimated length."""
        if self.args.train_sampling_strategy in ("random", "sequential") or not has_length(dataset):
            return dataset
        name, column = self.processing_class.model_input_names[0], self.args.length_column_name
        return [{name: range(estimated_length(record, column))} for record in dataset]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch. The output head sees the supervised positions only, so the outputs hold no logits to use."""
        inputs = {**inputs, "use_cache": False}  # with a cache, positions do not bound the records of a padding-free batch
        self._pass = SupervisedPass(inputs["labels"], inputs.pop("token_weights", None), num_items_in_batch)
        if model.training:  # the pass has waited for the device, so the loss of the batch before is there
            self.check_batches_before()
        if self._wants_logits:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return loss, {"logits": outputs.logits}  # the Trainer cannot gather all that a model may add to them
        if self._untouched is None:
            self._untouched = self._examine(model, {name: value for name, value in inputs.items() if name != "labels"})
        with self._pass.at(self._head(), untouched=self._untouched):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _examine(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Return whether the model's logits are its head's output. ValueError if it mixes the records of a padding-free batch."""
        if self._padding_free and not keeps_records_apart(model, self._head(), inputs):
            raise ValueError(
                f"{type(self.model).__name__} does not keep the records of a padding-free batch apart, at least not with "
                "this attention implementation; train without padding_free"
            )
        return is_untouched(model, self._head(), inputs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as the Trainer does, but return as loss the mean over all supervised tokens, whatever batches they come in."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        bad = next((records for records, total, _ in self._evaluated if not total.isfinite()), None)
        mine = sum(float(total) for _, total, _ in self._evaluated), sum(count for _, _, count in self._evaluated), bad
        parts = gather_object([mine])  # from all processes
        if bad := next((records for _, _, records in parts if records is not None), None):
            raise DivergenceError(f"the loss of an evaluation is not finite, {named(bad)}; {self.last_good()}")
        output.metrics[f"{metric_key_prefix}_loss"] = sum(part[0] for part in parts) / max(1, sum(part[1] for part in parts))
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        inputs = {**inputs}
        records = inputs.pop(RECORD_IDS, [])
        inputs["labels"] = self._without_repeats(inputs, len(records))
        self._wants_logits = not prediction_loss_only  # predict(), and evaluate() with metrics to compute
        try:
            outputs = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._wants_logits = False
        self._evaluated.append((records, self._pass.total, self._pass.count))
        return outputs

    def _without_repeats(self, inputs: dict[str, Any], count: int) -> Tensor:
        """Return the labels of `count` records, without the first records, with which several processes fill up the last batches."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs["labels"]
        own = min(max(state.remainder - self.args.process_index * count, 0), count)
        return inputs["labels"].masked_fill(record_rows(inputs) >= own, IGNORED)  # [B, S]

    def _loss(self, outputs: CausalLMOutputWithPast, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        return self._pass.result(outputs.logits)

    def _head(self) -> nn.Module:  # looked up, since adding tokens or adapters replaces it
        return self.model.get_output_embeddings()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer saves a few models (LLaVA, Qwen-VL, mixtures of experts) under the names of their public weights,
        # but looks for the names in memory when it resumes, finds none and goes on (transformers issue 48805).
        target = self.model if model is None else model
        plain = target if isinstance(target, PreTrainedModel) and not self.is_fsdp_enabled else None
        if plain is not None and get_model_conversion_mapping(plain, add_legacy=False):
            # float32, since trained weights may be float32 while the checkpoint's config names another type; loading casts back
            plain.load_state_dict(type(plain).from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
