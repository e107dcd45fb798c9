"""A training that diverges is stopped before numbers that are not finite reach a checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from mof.data.digests import record_id
from vig.training.checkpoints import seal, writing

RECORD_IDS = "record_ids"  # the key of a batch under which `NamedBatches` puts the records' ids
MOST_NAMED = 20  # records in a message


class DivergenceError(ValueError):
    """A DivergenceError says that a loss, a gradient or a weight is not finite. The message tells the step, and names the records."""


class NamedBatches:
    """NamedBatches gives the batches of another collator, with the ids of their records beside the tensors."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, records: Sequence[Any]) -> dict[str, Any]:
        return {**self.collator(records), RECORD_IDS: [record_id(record) for record in records]}


class Watch:
    """Watch holds losses and gradients that were not checked yet. The device may still compute them, and no step should wait for it."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, str, Sequence[str], Tensor | float]] = []

    def add(self, step: int, what: str, records: Sequence[str], value: Tensor | float) -> None:
        """Take a number that `check` will look at. `what` is its name for messages, such as "the loss"."""
        self._pending.append((step, what, records, value))

    def check(self, then: Callable[[], str]) -> None:
        """Check all numbers since the last call. This waits for the device.

        Args:
            then: returns the end of the message, which names the last good checkpoint.

        Raises:
            DivergenceError: for the first number that is not finite.
        """
        pending, self._pending = self._pending, []
        for step, what, records, value in pending:
            if not math.isfinite(float(value)):
                raise DivergenceError(f"the training diverged: {what} of step {step} is {float(value)}, {named(records)}; {then()}")


def named(records: Sequence[str]) -> str:
    """Return "with the records 'a', 'b'", cut after `MOST_NAMED` records."""
    more = f" and {len(records) - MOST_NAMED} more" if len(records) > MOST_NAMED else ""
    return f"with the records {', '.join(map(repr, records[:MOST_NAMED]))}{more}" if records else "with records of another process"


@torch.no_grad()
def not_finite(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the weights with a number that is not finite. This process looks at its own shards of sharded weights."""
    own = [(name, weight.to_local() if isinstance(weight, DTensor) else weight) for name, weight in weights]
    finite = [(name, weight.isfinite().all()) for name, weight in own]
    return [name for name, good in finite if not bool(good)]


class WatchedTrainer(Trainer):
    """WatchedTrainer stops at the first loss, gradient or weight that is not finite, and keeps two promises about its checkpoints.

    Their weights are finite, and a list of digests tells whether they are whole (`vig.training.checkpoints`).
    """

    data_collator: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._watch = Watch()
        self._step_records: list[str] = []  # records of the current step, in this process

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        own, self.data_collator = self.data_collator, NamedBatches(self.data_collator)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = own

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        records = inputs.pop(RECORD_IDS, [])
        self._step_records += records
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._watch.add(self.state.global_step + 1, "the loss", records, loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and not self.args.fp16:  # float16 scales the loss, and leaves out a step with too large gradients
            self._watch.add(self.state.global_step + 1, "the norm of the gradient", self._step_records, norm)
        self._step_records = []
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:  # these wait for the device anyway
            self._watch.check(self.last_good)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._run_epoch(*args, **kwargs)
        self.require_finite()
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite()
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        with writing(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its random state
            if self.args.should_save:
                seal(folder)

    def check_batches_before(self) -> None:
        """Check the batches before the current batch. Call it after a wait for the device."""
        self._watch.check(self.last_good)

    def require_finite(self) -> None:
        """Raise a DivergenceError if a loss, a gradient or a trained weight so far is not finite."""
        self._watch.check(self.last_good)
        trained = ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)
        if bad := not_finite(trained):
            raise DivergenceError(
                f"the training diverged: after step {self.state.global_step}, {len(bad)} weights are not finite, the first is {bad[0]}; "
                + self.last_good()
            )

    def last_good(self) -> str:
        """Return the end of a message: possible remedies, and the last checkpoint."""
        advice = "a smaller learning rate, a longer warm-up or other records may help"
        last = get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None
        return f"{advice}. " + ("There is no checkpoint yet" if last is None else f"The last good checkpoint is {last}")
