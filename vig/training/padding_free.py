"""A batch without padding has all records in one row. Positions that start again at 0 keep them apart.

Without an attention mask, transformers' attention takes such positions for the bounds of the records: FlashAttention as sequence
lengths, other implementations as a block-diagonal mask. A model reads on from one record into the next if it ignores positions, or
if its positions are no plain count (in Qwen-VL they have three dimensions). `keeps_records_apart` finds this out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mof.data.answer_tokens import PER_TOKEN
from mof.data.collator import SupervisedCollator
from vig.output_head import IGNORED, logits_at

# Shapes: B = records in a batch, S = padded length, L = tokens of all records, V = vocabulary.

TOKENWISE = ("input_ids", "labels", "token_weights", *PER_TOKEN)


class PaddingFreeCollator:
    """PaddingFreeCollator gives each batch of another collator as a single row."""

    def __init__(self, collator: SupervisedCollator) -> None:
        self.collator = collator

    @property
    def left_out(self) -> int:
        """Return the number of times that the collator left out a record so far."""
        return self.collator.left_out

    def __call__(self, records: Sequence[Any]) -> dict[str, Tensor]:
        return flatten(self.collator(records))


def flatten(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch without its padding: every entry per token [B, S] as [1, L], position_ids [1, L] in place of the attention mask."""
    attended = batch["attention_mask"].bool()  # [B, S]
    flat = {key: value[attended][None] if key in TOKENWISE else value for key, value in batch.items() if key != "attention_mask"}
    flat["position_ids"] = (attended.long().cumsum(1) - 1)[attended][None]  # [1, L]
    if "labels" in flat:  # the last token of a record does not predict the first of the next
        flat["labels"] = flat["labels"].where(flat["position_ids"] > 0, IGNORED)  # [1, L]
    return flat


def record_rows(batch: Mapping[str, Any]) -> Tensor:
    """Return the number of the record, in its batch, that each token belongs to: [B, 1] for a padded batch, [1, L] for a flat batch."""
    if "attention_mask" in batch:
        return torch.arange(len(batch["labels"]), device=batch["labels"].device)[:, None]  # [B, 1]
    return (batch["position_ids"] == 0).cumsum(1) - 1  # [1, L]


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch that `flatten` was given, with padding on the right."""
    starts = (flat["position_ids"][0] == 0).nonzero().flatten()  # [B]
    sizes = torch.diff(starts, append=starts.new_tensor([flat["position_ids"].shape[1]])).tolist()
    batch = {}
    for key, value in flat.items():
        if key in TOKENWISE:
            fill = {"labels": IGNORED, "input_ids": int(value[0, -1])}.get(key, 0)  # a token of text: none may be an image's
            batch[key] = torch.nn.utils.rnn.pad_sequence(value[0].split(sizes), batch_first=True, padding_value=fill)  # [B, S]
        elif key != "position_ids":
            batch[key] = value
    attended = [torch.ones(size, dtype=torch.long, device=starts.device) for size in sizes]
    return batch | {"attention_mask": torch.nn.utils.rnn.pad_sequence(attended, batch_first=True)}  # [B, S]


def keeps_records_apart(model: nn.Module, head: nn.Module, flat: Mapping[str, Any]) -> bool:
    """Return whether the model gives the same logits at the end of every record, flattened and padded."""
    padded = unflatten(flat)
    sizes = padded["attention_mask"].sum(1)  # [B]
    rows = torch.arange(len(sizes), device=sizes.device)  # [B]
    _, in_one_row = logits_at(model, head, flat, rows * 0, sizes.cumsum(0) - 1)  # [B, V]
    _, in_own_rows = logits_at(model, head, padded, rows, sizes - 1)  # [B, V]
    apart = 1e-3 if in_one_row.dtype == torch.float32 else 0.1  # share of the logits' spread; rounding is far below, a leak far above
    return bool((in_one_row - in_own_rows).float().abs().mean() <= apart * in_own_rows.float().std())
