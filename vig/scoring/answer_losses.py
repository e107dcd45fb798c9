"""-log q of every answer token by any causal model, with the vocabulary projection at answer positions only.

A model of transformers ends in its head, a linear map to the vocabulary. On the way into it the hidden states are caught, those
that predict an answer token are gathered, and the head is applied to a few of them at a time: logits of all positions, most
of the memory of a plain forward pass, never exist.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mof.data.answer_tokens import Example
from mof.data.collator import collate
from vig.scoring.prefix_cache import CannotShareError, cache_name, first_rows, image_positions, part, shared_cache

# Shapes: R = records in a batch, S = padded length, P = tokens of a shared prefix, N = answer tokens in a batch,
# K = positions whose logits are asked for, D = width of the model, V = its vocabulary.

logger = logging.getLogger(__name__)

IGNORED = -100  # label of every token outside the answers
CHUNK = 256  # answer positions whose logits exist at a time

Groups = Sequence[Sequence[Example]]


class AnswerLosses:
    """Losses of batches of examples, the fast way where it is right for the model.

    The first batch of each kind is compared with a plain forward pass; what differs is not used in this run, and the log
    says so once.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        self._model, self._pad_token_id = model, pad_token_id
        self._head: nn.Module | None = model.get_output_embeddings()
        self._chunked: bool | None = None  # False: the model does something to its logits, so it makes them itself
        self._may_share = True
        self._checked: set[bool] = set()  # with and without sharing

    @torch.inference_mode()
    def __call__(self, groups: Groups, prefix: int) -> Tensor:
        """-log q(answer token | what comes before it), one example after the other: [N], float32.

        Args:
            groups: examples; those of a group have the same images and the same first `prefix` tokens.
            prefix: 0 shares nothing.
        """
        ways = self._may_share, self._head
        try:
            return self._fastest(groups, prefix)
        except Exception:  # not even plainly: that is the batch's fault, and says nothing about the ways that were given up
            self._may_share, self._head = ways
            raise

    def _fastest(self, groups: Groups, prefix: int) -> Tensor:
        if prefix and self._may_share and self._head is not None:
            losses = self._checked_losses(groups, prefix, "computes what comes before the question for every record anew")
            if losses is not None:
                return losses
            self._may_share = False
        if self._head is not None:
            losses = self._checked_losses(groups, 0, "makes the logits of all positions")
            if losses is not None:
                return losses
            self._head = None
        return self._losses(groups, 0)

    def _checked_losses(self, groups: Groups, prefix: int, otherwise: str) -> Tensor | None:
        """The losses of a batch; of the first one only if those of its shortest example are what a plain forward pass gives."""
        if (prefix > 0) in self._checked:
            return self._losses(groups, prefix)
        examples = [example for group in groups for example in group]
        shortest = min(range(len(examples)), key=lambda i: len(examples[i].input_ids))  # it has the most padding
        try:
            losses = self._losses(groups, prefix)  # [N]
        except torch.OutOfMemoryError:
            raise
        except (CannotShareError, ValueError, RuntimeError, TypeError, IndexError) as error:  # the model does not go along
            reason = f"{type(error).__name__}: {error}"
        else:
            own = losses.split([int(example.answer_mask.sum()) for example in examples])[shortest]  # [its answer tokens]
            plain = self._plain_losses(self._collate([examples[shortest]]))  # [its answer tokens]
            difference = (own - plain).abs().where(plain.isfinite(), 0)  # [its answer tokens]
            # in half precision two right ways differ by some hundredths of a nat, a wrong one by much more on average
            exact = self._model.dtype in (torch.float32, torch.float64)
            apart = float(difference.max() if exact else difference.mean())
            if apart <= (1e-3 if exact else 5e-2):
                self._checked.add(prefix > 0)
                return losses
            reason = f"it differs by {apart:.1g} nats from a plain forward pass"
        logger.warning("scoring %s %s, which is slower: %s", type(self._model).__name__, otherwise, reason)
        return None

    def _losses(self, groups: Groups, prefix: int) -> Tensor:
        examples = [example for group in groups for example in group]
        if prefix:
            return self._shared_losses(groups, examples, prefix)
        batch = self._collate(examples)
        return self._plain_losses(batch) if self._head is None else self._head_losses(batch, {"use_cache": False})

    def _shared_losses(self, groups: Groups, examples: Sequence[Example], prefix: int) -> Tensor:
        """The prefix of each group once, then the rest of all examples behind it."""
        sizes = [len(group) for group in groups]
        start = self._collate([part(group[0], 0, prefix) for group in groups])
        rest = self._collate([part(example, prefix, None) for example in examples])
        positions = image_positions(self._model, examples, self._pad_token_id)  # [3, R, P + S]
        if positions is not None:
            start["position_ids"] = positions[:, first_rows(sizes), :prefix]  # [3, G, P]
            rest["position_ids"] = positions[:, :, prefix:]  # [3, R, S]
        del start["labels"]
        with _Tap(self._head, torch.zeros(1).long(), torch.zeros(1).long()):  # no logits of a prefix are needed
            output = self._model(**self._to_device(start), use_cache=True)
        name = cache_name(output)
        seen = rest["attention_mask"].new_ones(len(examples), prefix)  # [R, P]
        rest["attention_mask"] = torch.cat([seen, rest["attention_mask"]], dim=1)  # [R, P + S]
        return self._head_losses(rest, {name: shared_cache(getattr(output, name), sizes, prefix), "use_cache": True})

    def _head_losses(self, batch: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """The head at the N answer positions, in chunks where its output is the logits."""
        assert self._head is not None
        rows, columns, targets = self._answers(batch["labels"])  # [N] each
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        one = self._chunked is not False
        with _Tap(self._head, rows, columns, one=one) as tap:
            logits = self._model(**self._to_device(inputs), **options).logits  # [1, 1, V], or [1, N, V] if not chunked
        if tap.hidden is None or logits.shape[:2] != (1, 1 if one else len(targets)):
            raise ValueError(f"{type(self._model).__name__} does not take its logits from its output embeddings")
        targets = targets.to(logits.device)
        if not one:
            return F.cross_entropy(logits[0].float(), targets, reduction="none")  # [N]
        if self._chunked is None:
            self._chunked = torch.equal(logits.float(), self._head(tap.hidden[:, :1]).float())
            if not self._chunked:  # it scales, caps or masks its logits
                return self._head_losses(batch, options)
        pieces = zip(tap.hidden[0].split(CHUNK), targets.split(CHUNK), strict=True)  # [CHUNK, D], [CHUNK]
        return torch.cat([F.cross_entropy(self._head(some[None])[0].float(), ids, reduction="none") for some, ids in pieces])  # [N]

    def _plain_losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """By the model's own logits at all positions, or at those where some record has an answer if it can be asked for them."""
        rows, columns, targets = self._answers(batch["labels"])  # [N] each
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        kept = torch.arange(batch["labels"].shape[1])  # [K] = [S]
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            kept, columns = columns.unique(return_inverse=True)  # [K], [N]
            inputs["logits_to_keep"] = kept
        logits = self._model(**self._to_device(inputs), use_cache=False).logits  # [R, K, V]
        if logits.shape[:2] != (len(batch["labels"]), len(kept)):
            raise ValueError(
                f"{type(self._model).__name__} gave logits of shape {tuple(logits.shape)}, expected {len(batch['labels'])} records with "
                f"{len(kept)} positions: processor and model must agree on the number of tokens per image"
            )
        answers = logits[rows.to(logits.device), columns.to(logits.device)].float()  # [N, V]
        return F.cross_entropy(answers, targets.to(logits.device), reduction="none")  # [N]

    def _answers(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of the positions that predict an answer token, and the tokens: position t predicts token t + 1."""
        rows, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)  # [N], [N]
        return rows, columns, labels[rows, columns + 1]

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        # padding goes right whatever the tokenizer prefers: then no position moves and a causal model never sees it
        return collate(examples, self._pad_token_id, "right")

    def _to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self._model.device) for name, value in batch.items()}


class _Tap:
    """While open: gathers the head's input [R, S, D] at rows and columns into `hidden` [1, N, D], and lets the head see only
    that, or with `one` only its first position."""

    def __init__(self, head: nn.Module | None, rows: Tensor, columns: Tensor, *, one: bool = False) -> None:
        self._head, self._rows, self._columns, self._one = head, rows, columns, one
        self.hidden: Tensor | None = None

    def __enter__(self) -> _Tap:
        assert self._head is not None
        self._handle = self._head.register_forward_pre_hook(self._gather)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _gather(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        device = inputs[0].device
        self.hidden = inputs[0][self._rows.to(device), self._columns.to(device)][None]  # [1, N, D]
        return (self.hidden[:, :1] if self._one else self.hidden, *inputs[1:])
