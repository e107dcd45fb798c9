"""HeadPass runs the output head at chosen positions only. The logits of all positions, which need the most memory, are never made.

A model ends in its output head, a map from hidden states to the vocabulary. During a forward pass, another function takes the place
of the head's own forward. It gathers the positions that predict a labelled token and applies the head to a chunk of them at a time.
This must run inside of the head, under its hooks, because the head's weight may be in shards (FSDP2, ZeRO-3), which are joined only
while the module runs, or have an adapter (LoRA). The result must be part of the model's output, because the hooks wait there for the
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Shapes: B = records in a batch, S = padded length, N = positions that predict a labelled token, D = width of the model,
# V = vocabulary, K = positions that the caller asks for, C = tokens of a chunk.

IGNORED = -100  # label of every token without loss
CHUNK = 256  # number of positions whose logits are in memory at a time
CACHED = 2**20  # number of logits whose losses a CPU computes at a time: more do not fit into its cache, which takes three times as long
GRADIENT_CHUNK = 1024  # this number when gradients are needed; the logits of more positions are computed again for the gradient

Forward = Callable[[Tensor], Tensor]
Values = Callable[[Tensor, Tensor], Tensor]  # float32 logits [C, V] and targets [C] -> values of each target [C, ...]


class HeadPass:
    """HeadPass is a forward pass in which the output head works at N positions only. It gives the losses of the N tokens after them.

    Args:
        labels: [B, S], -100 for a token without loss. A batch without any other label gets a single loss of 0 with a gradient of 0.
        values: computes values from each chunk of logits, in place of the losses.
    """

    def __init__(self, labels: Tensor, values: Values | None = None) -> None:
        # Here and not inside of the head, because `nonzero` waits for the device, which is not yet busy with this batch.
        positions, targets = target_positions(labels)  # [N], [N]
        self.count = len(positions)
        """Number of tokens that have a loss."""
        if not self.count:  # a single ignored token: not every kernel takes an empty matrix, and every parameter needs a gradient
            positions, targets = positions.new_zeros(1), targets.new_full((1,), IGNORED)  # [1], [1]
        self.positions, self._targets, self._shape = positions, targets, labels.shape
        self._result: Tensor | None = None
        self._values = values or cross_entropy

    def reduce(self, losses: Tensor) -> Tensor:
        """Return the result of the pass from the losses (or values) of the N tokens, float32 [N, ...]; here the losses themselves."""
        return losses

    @contextmanager
    def at(self, head: nn.Module, *, untouched: bool) -> Iterator[None]:
        """Let the head work at the N positions only, while the context is open.

        Args:
            untouched: the model gives its head's output as its logits (`is_untouched`). Then the head computes the result. Another
                model scales, caps or masks its logits: it gets the logits of the N positions, [1, N, V], and does so.
        """

        def forward(own: Forward, hidden: Tensor) -> Tensor:
            rows = self._gather(hidden)  # [N, D]
            if not untouched:
                return own(rows[None])  # [1, N, V]
            self._result = self.reduce(token_losses(rows, self._targets, own, self._values))
            return self._result.repeat(1, 1, 1)  # not a view, which FSDP2 warns of

        with replaced_forward(head, forward):
            yield

    def result(self, logits: Tensor) -> Tensor:
        """Return the output of `reduce` for the logits that the model gave, inside or outside of `at`."""
        if self._result is not None:
            carried = logits.view_as(self._result)  # the result, perhaps rounded by mixed precision; its gradient is right
            return carried + (self._result.to(carried.device) - carried).detach()
        if logits.shape[:2] == (1, len(self.positions)) != self._shape:
            return self.reduce(token_losses(logits[0], self._targets, None, self._values))
        return self.reduce(token_losses(self._gather(logits), self._targets, None, self._values))

    def _gather(self, x: Tensor) -> Tensor:
        """Return the entries [N, ...] of x [B, S, ...] at the N positions."""
        if x.shape[:2] != self._shape:
            raise ValueError(
                f"the model's output head works on {tuple(x.shape[:2])} records and positions, the labels are {tuple(self._shape)}: "
                "processor and model must agree on the number of tokens per image"
            )
        return x.flatten(0, 1)[sent(self.positions, x.device)]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device. From the CPU to a GPU it goes through pinned memory, so that nobody waits for the GPU's queue."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def target_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the N positions that predict a labelled token, as indices into B * S, and these tokens: labels [B, S] -> [N], [N]."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # [B * S]: position t predicts token t + 1
    positions = (targets != IGNORED).nonzero().flatten()  # [N]
    return positions, targets[positions]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each target, [C]."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


def loss_logit_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return [C, 3]: the loss and the logit of each target, and the entropy over the vocabulary at its position, in nats.

    The result is of no use for a gradient.
    """
    logit = logits.gather(1, targets[:, None])[:, 0]  # [C]
    log_probabilities = logits.log_softmax(-1)  # [C, V]
    loss = -log_probabilities.gather(1, targets[:, None])[:, 0]  # [C]
    log_probabilities.clamp_min_(torch.finfo(logits.dtype).min)  # a model may mask tokens with -inf, and 0 * -inf is NaN
    entropy = -torch.linalg.vecdot(log_probabilities.exp(), log_probabilities)  # [C]
    return torch.stack([loss, logit, entropy], dim=1)


def token_losses(rows: Tensor, targets: Tensor, logits_of: Forward | None = None, values: Values = cross_entropy) -> Tensor:
    """Return the cross-entropy of each target, float32 [N], or the `values` of each target, [N, ...].

    Args:
        rows: hidden states [N, D] for `logits_of`, or logits [N, V].
        targets: [N] tokens.
        logits_of: the head's own forward.
        values: computes the values of a chunk from its logits and targets.
    """

    def chunk_losses(rows: Tensor, targets: Tensor) -> Tensor:
        logits = rows if logits_of is None else logits_of(rows[None])[0]  # [CHUNK, V]
        targets = targets.to(logits.device)
        few = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        return torch.cat([values(part.float(), aims) for part, aims in zip(logits.split(few), targets.split(few), strict=True)])

    targets, gradient = sent(targets, rows.device), torch.is_grad_enabled()
    size = GRADIENT_CHUNK if gradient else CHUNK
    losses_of = partial(checkpoint, chunk_losses, use_reentrant=False) if gradient and len(rows) > size else chunk_losses
    chunks = zip(rows.split(size), targets.split(size), strict=True)
    return torch.cat([losses_of(*chunk) for chunk in chunks])  # [N, ...]


def is_untouched(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Return whether the model gives its head's output as its logits. This is tried at a single position of a batch.

    Raises:
        ValueError: when the logits do not come from the head at all.
    """
    first = torch.zeros(1, dtype=torch.long)  # [1]
    logits, output = logits_at(model, head, inputs, first, first)  # [1, 1, V], [1, V]
    return torch.equal(logits[0].to(output), output)


@torch.no_grad()
def logits_at(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the model's logits [1, K, V] and its head's output [K, V] at K positions of a batch, in eval mode."""
    outputs: list[Tensor] = []

    def forward(own: Forward, hidden: Tensor) -> Tensor:
        outputs.append(own(hidden[rows.to(hidden.device), columns.to(hidden.device)][None])[0])  # [K, V]
        return outputs[-1][None].clone()  # [1, K, V]; a model may write into its logits

    with evaluating(model), replaced_forward(head, forward):
        logits = model(**inputs).logits
    if not outputs or logits.shape != (1, *outputs[-1].shape):
        raise ValueError(f"{type(model).__name__} does not take its logits from its output embeddings, so no loss can be gathered there")
    return logits, outputs[-1]


@contextmanager
def replaced_forward(head: nn.Module, forward: Callable[[Forward, Tensor], Tensor]) -> Iterator[None]:
    """Run `forward(own, hidden)` in place of the head's own forward, under the head's hooks, while the context is open."""
    own, of_the_instance = head.forward, "forward" in vars(head)  # accelerate and others put their forward into the instance
    head.forward = lambda hidden: forward(own, hidden)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if of_the_instance:
            head.forward = own  # type: ignore[method-assign]
        else:
            del head.forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode while the context is open. Afterwards each module has the mode that it had before.

    A user may have put frozen parts into eval mode, so `model.train()` would be wrong.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
