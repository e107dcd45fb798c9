"""The key-value cache of all tokens up to the last image is computed once, and read by all records with the same images."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import ModelOutput

from mof.data.answer_tokens import ATTENTION_MASK, PER_TOKEN, Example
from mof.data.collator import collate

# Shapes: G = groups of records that share a prefix, R = records of all groups, P = tokens of a prefix, S = padded tokens
# after it, H = key-value heads, E = channels of a head.


class CannotShareError(Exception):
    """CannotShareError says that a model caches something other than keys and values of every token, so rows cannot share its past."""


class SharedLayer(DynamicLayer):
    """SharedLayer holds the keys and values of G prefixes in a layer, which R rows read.

    Nothing is added to them, because the rows go through the model in a single pass.
    """

    def __init__(self, layer: DynamicLayer, sizes: Sequence[int]) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values, self.sizes = layer.keys, layer.values, sizes  # [G, H, P, E] twice

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the prefixes before the rows: keys and values [R, H, S, E] of the rows become keys and values [R, H, P + S, E]."""
        return self._behind(self.keys, key_states), self._behind(self.values, value_states)

    def _behind(self, prefixes: Tensor, rows: Tensor) -> Tensor:
        past = prefixes.shape[2]
        whole = rows.new_empty(*rows.shape[:2], past + rows.shape[2], rows.shape[3])  # [R, H, P + S, E]
        whole[:, :, past:] = rows
        for prefix, slot in zip(prefixes, whole[:, :, :past].split(list(self.sizes)), strict=True):
            slot.copy_(prefix)  # [H, P, E] -> [rows of the group, H, P, E]
        return whole


def cache_name(output: ModelOutput) -> str:
    """Return the name under which a model returns and takes its cache: "cache" from transformers 5.24 on, "past_key_values" before.

    Raises:
        CannotShareError: for a model that gives no cache.
    """
    for name in ("cache", "past_key_values"):
        if name in output.keys():  # noqa: SIM118  `in output` accepts both names, and warns of the old name
            return name
    raise CannotShareError("it gives no cache")


def shared_cache(cache: Any, sizes: Sequence[int], prefix: int) -> Cache:
    """Make the cache of G prefixes of P = `prefix` tokens the past of R rows: prefix g is the past of `sizes[g]` rows.

    Raises:
        CannotShareError: for a cache with sliding windows, recurrent states or keys of cross-attention, and for no cache.
    """
    layers = cache.layers if isinstance(cache, Cache) else [cache]
    unknown = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if unknown:
        raise CannotShareError(f"its cache holds {', '.join(unknown)}")
    lengths = {layer.keys.shape[2] for layer in layers}
    if lengths != {prefix}:  # the model has layers of cross-attention to its images, and a mask that says which tokens see which image
        raise CannotShareError(f"its cache holds keys of {', '.join(map(str, sorted(lengths)))} tokens for a prefix of {prefix}")
    return Cache(layers=[SharedLayer(layer, sizes) for layer in layers])


def part(example: Example, start: int, end: int | None) -> Example:
    """Return the tokens start..end-1 of an example. The images go with the first token."""
    images = {
        key: value[start:end] if key in PER_TOKEN else value for key, value in example.images.items() if key in PER_TOKEN or start == 0
    }
    return replace(example, input_ids=example.input_ids[start:end], answer_mask=example.answer_mask[start:end], images=images)


def image_positions(model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int) -> Tensor | None:
    """Return the positions [3, R, L] for a model whose tokens have places in the image (Qwen-VL and similar), or None for other models.

    These models compute the positions from the image sizes. When the images are in the past, they would use the offset of each row
    that they remember, but these offsets belong to the rows of another call.
    """
    locate = getattr(model.base_model, "get_rope_index", None)
    if locate is None:
        return None
    wanted = set(inspect.signature(locate).parameters) - {ATTENTION_MASK}  # hidden tokens have their positions, too
    sized = [replace(e, images={key: value for key, value in e.images.items() if key in wanted}) for e in examples]
    batch = collate(sized, pad_token_id)
    return locate(**{key: value for key, value in batch.items() if key in {*wanted, ATTENTION_MASK}})[0]  # [3, R, L]
