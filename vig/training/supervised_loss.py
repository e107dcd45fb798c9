"""The loss of a batch with the vocabulary projection at supervised positions only: logits of all positions never exist.

A model ends in its output head, a map from hidden states to the vocabulary. For one forward pass another forward takes the
place of the head's own; it gathers the supervised positions and gives the batch's loss in place of logits. It has to happen
there, under the head's hooks: the head's weight may be in shards (FSDP2, ZeRO-3), which are together only while the module
runs, or wear an adapter (LoRA). And the loss has to leave by the model's output, where those hooks wait for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Shapes: B = records in a batch, S = padded length, N = supervised positions of the batch, D = width of the model, V = vocabulary.

IGNORED = -100  # label of every token without loss
CHUNK = 1024  # positions whose logits exist at a time

Forward = Callable[[Tensor], Tensor]


class SupervisedPass:
    """One forward pass and its loss: the sum of weight * cross-entropy over the supervised tokens, divided by `count`.

    Args:
        labels: [B, S], -100 for a token without loss. A batch of nothing else has loss 0 and gradient 0.
        weights: [B, S], a factor for the loss of each token; None for 1.
        count: what the sum is divided by; None for the number of supervised tokens in `labels`.
    """

    def __init__(self, labels: Tensor, weights: Tensor | None = None, count: Tensor | int | None = None) -> None:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # [B * S]: position t predicts token t + 1
        # Here and not in the head: finding them waits for the device, which is not yet busy with this batch.
        positions = (targets != IGNORED).nonzero().flatten()  # [N]
        self._count = len(positions) if count is None else count
        if not len(positions):  # one without loss, as not every kernel takes an empty matrix; every parameter has gradient 0
            positions = positions.new_zeros(1)  # [1]
        self._shape, self._positions, self._targets = labels.shape, positions, targets[positions]
        self._weights = None if weights is None else F.pad(weights[:, 1:], (0, 1)).flatten()[positions]  # [N]
        self._loss: Tensor | None = None

    @contextmanager
    def at(self, head: nn.Module, *, untouched: bool) -> Iterator[None]:
        """While open, the head works at the supervised positions only.

        Args:
            untouched: the model's logits are its head's output as it is (`is_untouched`). Then the head gives the loss. A model
                that scales, caps or masks its logits gets those of the supervised positions, [1, N, V], to do so.
        """

        def forward(own: Forward, hidden: Tensor) -> Tensor:
            rows = self._gather(hidden)  # [N, D]
            if not untouched:
                return own(rows[None])  # [1, N, V]
            self._loss = self._sum(rows, own)
            return self._loss.repeat(1, 1, 1)  # not a view, which FSDP2 warns of

        with replaced_forward(head, forward):
            yield

    def loss(self, logits: Tensor) -> Tensor:
        """A float32 scalar from the logits that the model gave, inside or outside of `at`."""
        if self._loss is not None:
            carried = logits.sum()  # what is left of it where mixed precision rounds outputs; its gradient is 1 all the same
            return carried + (self._loss - carried).detach()
        if logits.shape[:2] == (1, len(self._positions)) != self._shape:
            return self._sum(logits[0])
        return self._sum(self._gather(logits))

    def _gather(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [N, ...]"""
        if x.shape[:2] != self._shape:
            raise ValueError(
                f"the model's output head works on {tuple(x.shape[:2])} records and positions, the labels are {tuple(self._shape)}: "
                "processor and model must agree on the number of tokens per image"
            )
        return x.flatten(0, 1)[self._positions.to(x.device)]

    def _sum(self, rows: Tensor, logits_of: Forward | None = None) -> Tensor:
        """Of hidden states [N, D] and their map to logits, or of logits [N, V]. More than a chunk is computed twice."""

        def chunk_sum(rows: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
            logits = (rows if logits_of is None else logits_of(rows)).float()  # [CHUNK, V]
            if weights is None:
                return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none") @ weights.float()

        targets = self._targets.to(rows.device)  # [N]
        weights = None if self._weights is None else self._weights.to(rows.device)  # [N]
        if len(rows) <= CHUNK:
            total = chunk_sum(rows, targets, weights)
        else:
            parts = [part.split(CHUNK) for part in (rows, targets)]
            factors = [None] * len(parts[0]) if weights is None else weights.split(CHUNK)
            total = torch.stack([checkpoint(chunk_sum, *some, use_reentrant=False) for some in zip(*parts, factors, strict=True)]).sum()
        return total / torch.as_tensor(self._count, device=total.device).clamp(min=1)


def is_untouched(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the model gives its head's output as its logits, tried on one position of a batch.

    Raises:
        ValueError: when the logits do not come from the head at all.
    """
    first = torch.zeros(1, dtype=torch.long)  # [1]
    logits, output = logits_at(model, head, inputs, first, first)  # [1, 1, V], [1, V]
    return torch.equal(logits[0].float(), output.float())


@torch.no_grad()
def logits_at(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The model's logits [1, K, V] and its head's output [K, V] at K positions of a batch, in eval mode."""
    seen: list[Tensor] = []

    def forward(own: Forward, hidden: Tensor) -> Tensor:
        seen.append(own(hidden[rows.to(hidden.device), columns.to(hidden.device)][None])[0])  # [K, V]
        return seen[-1][None].clone()  # [1, K, V]; a model may write into its logits

    training = model.training
    model.eval()
    with replaced_forward(head, forward):
        logits = model(**inputs).logits
    model.train(training)
    if not seen or logits.shape != (1, *seen[-1].shape):
        raise ValueError(f"{type(model).__name__} does not take its logits from its output embeddings, so no loss can be gathered there")
    return logits, seen[-1]


@contextmanager
def replaced_forward(head: nn.Module, forward: Callable[[Forward, Tensor], Tensor]) -> Iterator[None]:
    """While open, `forward(own, hidden)` runs in place of the head's own forward, and under the head's hooks."""
    own, of_the_instance = head.forward, "forward" in vars(head)  # accelerate and others put theirs into the instance
    head.forward = lambda hidden: forward(own, hidden)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if of_the_instance:
            head.forward = own  # type: ignore[method-assign]
        else:
            del head.forward
