"""AnswerLosses computes -log q of every answer token by any causal model.

It goes a fast way if this gives the losses of a plain forward pass with the model. Otherwise it makes plain forward passes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mof.data.answer_tokens import ATTENTION_MASK, Example
from mof.data.collator import collate
from vig.output_head import HeadPass, Values, cross_entropy, replaced_forward, sent, target_positions
from vig.scoring.prefix_cache import cache_name, image_positions, part, shared_cache

# Shapes: R = records in a batch, S = padded length, P = tokens of a shared prefix, G = groups that share a prefix, N = answer tokens in a
# batch, K = positions whose logits the model gives, V = vocabulary of the model.

logger = logging.getLogger(__name__)

Groups = Sequence[Sequence[Example]]


class AnswerLosses:
    """AnswerLosses computes the losses of batches of examples, the fast way if it is right for the model.

    The first batch of each kind is compared with a plain forward pass. A way that gives other losses is not used in this run, and
    the log says so once.

    Args:
        values: it computes the values of answer tokens from their logits, [N, ...]: the loss, or several values with the loss first.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int, values: Values = cross_entropy) -> None:
        self.model, self._pad_token_id, self._values = model, pad_token_id, values
        self._head: nn.Module | None = model.get_output_embeddings()
        self._untouched = False  # True if the model gives its head's output as its logits; known after the first check
        self._may_share = True
        self._checked: set[bool] = set()  # True: batches with a shared prefix are checked; False: batches without

    @torch.inference_mode()
    def __call__(self, groups: Groups, prefix: int) -> Tensor:
        """Return -log q(answer token | all tokens before it) for each answer token, [N] in the order of the examples, float32.

        With `values` of several columns, these are returned, [N, columns].

        Args:
            groups: groups of examples. The examples of a group have the same images and the same first `prefix` tokens.
            prefix: number of tokens; with 0, no examples share anything.
        """
        ways = self._may_share, self._head
        try:
            return self._fastest(groups, prefix)
        except Exception:  # the plain pass failed too, so the batch is at fault and the fast ways may be right
            self._may_share, self._head = ways
            raise

    def _fastest(self, groups: Groups, prefix: int) -> Tensor:
        if prefix and self._may_share and self._head is not None:
            losses = self._checked_losses(groups, prefix, "computes the tokens before the question for every record anew")
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
        """Return the losses of a batch, or None if this way is wrong for the model.

        The first batch decides: a few of its examples must have the losses of a plain forward pass with the same examples. (In half
        precision, an example has other losses in another batch.)
        """
        if (prefix > 0) in self._checked:
            return self._losses(groups, prefix)
        few = _few(groups)
        assert self._head is not None
        firsts: list[Tensor] = []  # first position of the head's output and of the logits; copies, because models write into both
        with (
            self._head.register_forward_hook(lambda _, inputs, output: firsts.append(output[:1, :1].clone())),
            self.model.register_forward_hook(lambda _, inputs, output: firsts.append(output.logits[:1, :1].clone())),
        ):
            plain = self._plain_losses(self._whole([example for group in few for example in group]))  # [their answer tokens]
        try:
            if len(firsts) < 2:
                raise ValueError(f"{type(self.model).__name__} does not take its logits from its output embeddings")
            self._untouched = torch.equal(firsts[-2], firsts[-1].to(firsts[-2]))
            difference = (self._losses(few, prefix) - plain).abs().where(plain.isfinite(), 0)  # [their answer tokens, ...]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model cannot go this way; models raise errors of any kind
            reason = f"{type(error).__name__}: {error}"
        else:
            difference = difference if difference.dim() == 1 else difference[:, 0]  # [their answer tokens] of the losses
            # In half precision, two right ways differ by 0.03 to 0.06 nats on average (SmolLM2 in bfloat16); positions that are wrong
            # by 8 make 0.12 to 0.39, a forgotten past 1.7 to 2.9.
            exact = self.model.dtype in (torch.float32, torch.float64)
            apart = float(difference.max() if exact else difference.mean())
            if apart <= (1e-3 if exact else 0.08):
                self._checked.add(prefix > 0)
                return self._losses(groups, prefix)
            reason = f"it differs by {apart:.1g} nats from a plain forward pass"
        logger.warning("scoring %s %s, which is slower: %s", type(self.model).__name__, otherwise, reason)
        return None

    def _losses(self, groups: Groups, prefix: int) -> Tensor:
        examples = [example for group in groups for example in group]
        if prefix:
            return self._shared_losses(groups, examples, prefix)
        batch = self._whole(examples)
        return self._plain_losses(batch) if self._head is None else self._head_losses(batch, {"use_cache": False})

    def _shared_losses(self, groups: Groups, examples: Sequence[Example], prefix: int) -> Tensor:
        """Return the losses [N] of examples with shared prefixes.

        The prefix of each group goes through the model once. Then the rest of all examples goes through it, with these prefixes as past.
        """
        assert self._head is not None
        sizes = [len(group) for group in groups]
        start = self._collate([part(group[0], 0, prefix) for group in groups])
        rest = self._collate([part(example, prefix, None) for example in examples])
        positions = image_positions(self.model, examples, self._pad_token_id)  # [3, R, P + S]
        if positions is not None:
            first_rows = torch.tensor([0, *sizes[:-1]]).cumsum(0)  # [G]
            start["position_ids"] = positions[:, first_rows, :prefix]  # [3, G, P]
            rest["position_ids"] = positions[:, :, prefix:]  # [3, R, S]
        with replaced_forward(self._head, lambda own, hidden: own(hidden[:1, :1])):  # no logits of a prefix are needed
            output = self.model(**self._inputs(start), use_cache=True)
        name = cache_name(output)
        seen = start["attention_mask"].repeat_interleave(torch.tensor(sizes), dim=0)  # [R, P]
        rest["attention_mask"] = torch.cat([seen, rest["attention_mask"]], dim=1)  # [R, P + S]
        return self._head_losses(rest, {name: shared_cache(getattr(output, name), sizes, prefix), "use_cache": True})

    def _head_losses(self, batch: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """Return the losses [N]; the head works at the answer positions only."""
        assert self._head is not None
        head_pass = HeadPass(batch["labels"], self._values)
        with head_pass.at(self._head, untouched=self._untouched):
            logits = self.model(**self._inputs(batch), **options).logits
        return head_pass.result(logits)  # [N]

    def _plain_losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the losses [N] from the model's own logits.

        A model that takes `logits_to_keep` gives logits only at the columns where a record has an answer; other models give all.
        """
        (records, length), (positions, targets) = batch["labels"].shape, target_positions(batch["labels"])  # [N], [N]
        rows, columns = positions // length, positions % length  # [N], [N]
        inputs, kept = self._inputs(batch), torch.arange(length)  # [K] = [S]
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            kept, columns = columns.unique(return_inverse=True)  # [K], [N]
            inputs["logits_to_keep"] = kept.to(self.model.device)
        logits = self.model(**inputs, use_cache=False).logits  # [R, K, V]
        if logits.shape[:2] != (records, len(kept)):
            raise ValueError(
                f"{type(self.model).__name__} gave logits of shape {tuple(logits.shape)}, expected {records} records with "
                f"{len(kept)} positions: processor and model must agree on the number of tokens per image"
            )
        answers = logits[rows.to(logits.device), columns.to(logits.device)].float()  # [N, V]
        return self._values(answers, targets.to(logits.device))  # [N, ...]

    def _whole(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the batch of whole examples. A model that finds positions from image sizes would miss images that a mask hides."""
        batch = self._collate(examples)
        hidden = any(ATTENTION_MASK in example.images for example in examples)
        positions = image_positions(self.model, examples, self._pad_token_id) if hidden else None  # [3, R, S]
        return batch if positions is None else {**batch, "position_ids": positions}

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        # padding goes right, whatever the tokenizer prefers, so that no position moves and a causal model never sees the padding
        return collate(examples, self._pad_token_id, "right")

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's inputs of a batch, on the device of the model."""
        return {name: sent(value, self.model.device) for name, value in batch.items() if name != "labels"}


def _few(groups: Groups) -> Groups:
    """Return the shortest and the longest example of two groups, among them the batch's shortest, which has the most padding."""
    by_length = [sorted(group, key=lambda example: len(example.input_ids)) for group in groups]
    ends = [ordered if len(ordered) == 1 else [ordered[0], ordered[-1]] for ordered in by_length]
    ends.sort(key=lambda both: len(both[0].input_ids))
    return ends if len(ends) == 1 else [ends[0], ends[-1]]
