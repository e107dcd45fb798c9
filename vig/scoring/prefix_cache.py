"""The key-value cache of [everything up to the last image], computed once and read by all records on the same images."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import ModelOutput

from mof.data.answer_tokens import PER_TOKEN, Example
from mof.data.collator import collate

# Shapes: G = groups of records that share a prefix, R = records of all groups, P = tokens of a prefix, S = padded tokens
# after it, H = key-value heads, E = channels of a head.


class CannotShareError(Exception):
    """The model keeps something else than keys and values of every token, so its past cannot be shared by rows."""


class SharedLayer(DynamicLayer):
    """One layer's keys and values of G prefixes, which R rows read. Nothing is added to them: the rows are one pass."""

    def __init__(self, layer: DynamicLayer, sizes: Sequence[int]) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values, self.sizes = layer.keys, layer.values, sizes  # [G, H, P, E] twice

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states and value_states [R, H, S, E] of the rows -> those of prefix and row, [R, H, P + S, E]."""
        return self._behind(self.keys, key_states), self._behind(self.values, value_states)

    def _behind(self, prefixes: Tensor, rows: Tensor) -> Tensor:
        past = prefixes.shape[2]
        whole = rows.new_empty(*rows.shape[:2], past + rows.shape[2], rows.shape[3])  # [R, H, P + S, E]
        whole[:, :, past:] = rows
        for prefix, slot in zip(prefixes, whole[:, :, :past].split(list(self.sizes)), strict=True):
            slot.copy_(prefix)  # [H, P, E] -> [rows of the group, H, P, E]
        return whole


def cache_name(output: ModelOutput) -> str:
    """The name under which a model gives its cache and takes it: "cache" from transformers 5.24 on, "past_key_values" before.

    Raises:
        CannotShareError: for a model that gives no cache.
    """
    for name in ("cache", "past_key_values"):
        if name in output.keys():  # noqa: SIM118  asked itself, the output takes both names and warns of the old one
            return name
    raise CannotShareError("it gives no cache")


def shared_cache(cache: Any, sizes: Sequence[int], prefix: int) -> Cache:
    """The cache of G prefixes of P = `prefix` tokens as the past of R rows, `sizes[g]` of them for prefix g.

    Raises:
        CannotShareError: for a cache with sliding windows, recurrent states or what cross-attention sees, or none at all.
    """
    layers = cache.layers if isinstance(cache, Cache) else [cache]
    other = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if other:
        raise CannotShareError(f"its cache holds {', '.join(other)}")
    lengths = {layer.keys.shape[2] for layer in layers}
    if lengths != {prefix}:  # it attends to its images from the side, each token to those that a mask allows
        raise CannotShareError(f"its cache holds keys of {', '.join(map(str, sorted(lengths)))} tokens for a prefix of {prefix}")
    return Cache(layers=[SharedLayer(layer, sizes) for layer in layers])


def part(example: Example, start: int, end: int | None) -> Example:
    """Tokens start..end-1. Images stay with the first token."""
    images = {
        key: value[start:end] if key in PER_TOKEN else value for key, value in example.images.items() if key in PER_TOKEN or start == 0
    }
    return replace(example, input_ids=example.input_ids[start:end], answer_mask=example.answer_mask[start:end], images=images)


def image_positions(model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int) -> Tensor | None:
    """[3, R, L] for a model whose tokens have places in the image (Qwen-VL and its kin); None where they are just counted.

    Such a model works them out from the image sizes. Once these are in the past it would remember an offset per row, but of
    the rows of another call.
    """
    locate = getattr(model.base_model, "get_rope_index", None)
    if locate is None:
        return None
    wanted = set(inspect.signature(locate).parameters)
    sized = [replace(e, images={key: value for key, value in e.images.items() if key in wanted}) for e in examples]
    batch = collate(sized, pad_token_id)
    return locate(**{key: value for key, value in batch.items() if key in wanted})[0]  # [3, R, L]


def first_rows(sizes: Sequence[int]) -> Tensor:
    """[G]: where each group's first row lies among the R rows."""
    return torch.tensor([0, *sizes[:-1]]).cumsum(0)
