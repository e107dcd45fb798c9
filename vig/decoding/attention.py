"""Attention of the language model, edited for one pass: scores before the softmax, or weights after it, of image tokens.

The language model takes its attention by the name "vig-decoding" while a pass runs, and by its own name before and after. The edited
rows of queries are computed densely; all other rows by torch's fused attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from vig.decoding.edits import AttentionEdit

# Shapes: R rows of a batch (records times beams), L tokens of a sequence so far, H heads, G key-value heads, S query tokens of a pass,
# Q edited query tokens (the last of them), K keys, E channels of a head, D channels of a token.

NAME = "vig-decoding"
_active: ContextVar[EditedAttention] = ContextVar(NAME)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    return _active.get()(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def image_tokens(model: PreTrainedModel, input_ids: Tensor) -> Tensor | None:
    """Return [R, P] whether a token of a prompt is an image token; None for a model with no image tokens between the tokens of text."""
    config = model.config
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    aside = config.is_encoder_decoder or hasattr(config.get_text_config(decoder=True), "cross_attention_layers")
    return None if aside or token is None else input_ids == token


class EditedAttention:
    """The attention of one generation.

    Args:
        image, text: [R, P] whether a token of the prompt is an image token, or another token that is no padding.
    """

    def __init__(self, model: PreTrainedModel, edit: AttentionEdit, image: Tensor, text: Tensor) -> None:
        self.model, self.edit, self.image, self.text, self.length = model, edit, image, text, image.shape[1]
        decoder = model.config.get_text_config(decoder=True)
        configs = [decoder, *(module.config for module in model.modules() if type(getattr(module, "config", None)) is type(decoder))]
        self._configs = list({id(config): config for config in configs}.values())
        self._layers = edit.layers(decoder.num_hidden_layers)
        if not self._layers:
            raise ValueError(
                f"{edit.name} edits the layers from {edit.first_layer} on, but the language model has {decoder.num_hidden_layers}: "
                "give a lower first_layer"
            )
        edit.check_width(decoder.hidden_size)
        self._starts = edit.starts(image)  # [R] the first edited token of each row
        self._first = int(self._starts.min())
        self._sinks: dict[int, Tensor] = {}  # layer -> [R, P]
        self._called = False

    @classmethod
    def of(cls, model: PreTrainedModel, input_ids: Tensor, edit: AttentionEdit, inputs: Mapping[str, Any]) -> EditedAttention | None:
        """Return the attention for a prompt [R, P]; None for a prompt without images.

        Raises:
            ValueError: for a model that puts no image tokens between the tokens of the text.
        """
        image = image_tokens(model, input_ids)
        if image is None or inputs.get("inputs_embeds") is not None:
            raise ValueError(f"{edit.name} needs image tokens between the tokens of the text, which {type(model).__name__} has not")
        mask = inputs.get("attention_mask")
        text = ~image if mask is None else ~image & mask.bool()
        return cls(model, edit, image, text) if image.any() else None

    @contextmanager
    def on(self, length: int) -> Iterator[None]:
        """Edit the attention of passes on sequences of `length` tokens (with those in the cache)."""
        self.length = length
        names = [config._attn_implementation for config in self._configs]
        hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in self._finders()]
        token = _active.set(self)
        try:
            for config in self._configs:
                config._attn_implementation = NAME
            yield
        finally:
            _active.reset(token)
            for config, name in zip(self._configs, names, strict=True):
                config._attn_implementation = name
            for hook in hooks:
                hook.remove()
        if not self._called:
            raise ValueError(
                f"{self.edit.name} edits attention, but the language model of {type(self.model).__name__} ({self._configs[0].model_type}) "
                "does not take its attention from transformers' AttentionInterface; choose a contrast such as vcd"
            )

    def _finders(self) -> Iterator[tuple[nn.Module, Any]]:
        """Yield the edited layers, each with a hook that finds its sinks."""
        if not self.edit.needs_sinks:
            return
        decoder = type(self.model.config.get_text_config(decoder=True))
        for name, module in self.model.named_modules():
            layer, config = getattr(module, "layer_idx", -1), getattr(module, "config", None)
            if layer in self._layers and type(config) is decoder and "Attention" in type(module).__name__:
                yield self.model.get_submodule(name.rpartition(".")[0]), self._finder(layer)

    def _finder(self, layer: int) -> Any:
        def find(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]  # [R, S, D]
            if states.shape[1] == self.length:  # the whole sequence, with all images
                self._sinks[layer] = self.edit.find_sinks(states[:, : self.image.shape[1]], self.image, self.text)

        return find

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Attend as transformers asks: query [R, H, S, E], key and value [R, G, K, E].

        The result is [R, S, H, E], and the weights [R, H, Q, K] of the last tokens, at least of the last token.
        """
        self._called = True
        if unknown := [name for name in ("s_aux", "position_bias") if options.get(name) is not None]:
            raise ValueError(
                f"{self.edit.name} cannot edit the attention of {type(self.model).__name__} ({self._configs[0].model_type}), "
                f"which has {', '.join(unknown)}"
            )
        edited = min(query.shape[2], self.length - self._first) if module.layer_idx in self._layers else 0
        dense = query.shape[2] if options.get("softcap") else max(edited, 1)
        rows, weights = self._dense(module, query[:, :, -dense:], key, value, attention_mask, edited > 0, options)
        if dense < query.shape[2]:
            others, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options | {"output_attentions": False})
            rows = torch.cat([others[:, :-dense], rows], dim=1)
        return rows, weights

    def _dense(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, edited: bool, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the attention [R, Q, H, E] of the last Q tokens, edited from each row's first edited token on, and its weights."""
        count, keys, shape = query.shape[2], key.shape[2], (*query.shape[:3], key.shape[2])
        scale = options.get("scaling")
        scores = _by_group(query, key) @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.view(shape)  # [R, H, Q, K]
        if cap := options.get("softcap"):
            scores = torch.tanh(scores / cap) * cap
        places = torch.arange(self.length - count, self.length, device=query.device)  # [Q]
        image = self._at_keys(self.image, keys) & (places[:, None] >= self._starts[:, None, None, None])  # [R, 1, Q, K]
        if edited:
            scores = self.edit.edit_scores(scores, image)
        if mask is None:
            causal = options.get("is_causal")
            if getattr(module, "is_causal", True) if causal is None else causal:
                last = torch.arange(count, device=query.device)[:, None] + min(keys, self.length) - count  # [Q, 1]
                scores = scores.masked_fill(torch.arange(keys, device=query.device) > last, torch.finfo(scores.dtype).min)
        else:
            mask = mask[:, :, -count:]
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32)
        if edited and self.edit.needs_sinks:
            sinks = self._sinks.get(getattr(module, "layer_idx", -1))
            if sinks is None:
                raise ValueError(f"{self.edit.name} looks for sinks in the prompt, so it cannot go on from a cache: give the whole prompt")
            weights = self.edit.edit_weights(weights, image, self._at_keys(sinks, keys) & image)
        return (_by_group(weights.to(value), key) @ value).view(*query.shape[:3], -1).transpose(1, 2), weights

    def _at_keys(self, marks: Tensor, keys: int) -> Tensor:
        """Return the marks [R, 1, 1, K] of the keys: a sliding window keeps the last tokens, a static cache has room behind them."""
        return F.pad(marks, (0, max(keys, self.length) - marks.shape[1]))[:, None, None, -keys:]


def _by_group(rows: Tensor, key: Tensor) -> Tensor:
    """Return rows [R, H, Q, X] as [R, G, H / G * Q, X], beside the key-value heads that they share."""
    return rows.reshape(len(rows), key.shape[1], -1, rows.shape[-1])
