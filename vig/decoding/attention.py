"""EditedAttention edits the language model's attention to image tokens: its scores before the softmax, or its weights after it.

The language model gets its attention under the name "vig-decoding" while a pass runs, and under its own name before and after. The
edited query tokens are computed densely, all others by torch's fused attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Shapes: R rows of a batch (records times beams), P tokens of a prompt, H heads, G key-value heads, S query tokens of a pass,
# Q edited query tokens (the last of them), K keys, E channels of a head.

NAME = "vig-decoding"
_active: ContextVar[EditedAttention] = ContextVar(NAME)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    return _active.get()(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def image_tokens(model: PreTrainedModel, input_ids: Tensor) -> Tensor | None:
    """Return a mask [R, P] of the image tokens in the prompts; None for a model that puts no image tokens between the tokens of text."""
    config = model.config
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    aside = config.is_encoder_decoder or hasattr(config.get_text_config(decoder=True), "cross_attention_layers")
    return None if aside or token is None else input_ids == token


class EditedAttention:
    """EditedAttention is the attention during a generation. This class edits nothing, but returns the weights of the last token.

    Args:
        method: the name of the method, for messages.
        input_ids: the prompts [R, P], with the model's other `inputs`.
        layers: the edited layers of the language model, counted from 0; negative numbers count from the end.

    Raises:
        ValueError: for a model that puts no image tokens between the tokens of the text, and for layers that it does not have.
    """

    def __init__(
        self, model: PreTrainedModel, method: str, input_ids: Tensor, inputs: Mapping[str, Any], layers: slice = slice(None)
    ) -> None:
        image, mask = image_tokens(model, input_ids), inputs.get("attention_mask")
        if image is None or inputs.get("inputs_embeds") is not None:
            raise ValueError(f"{method} needs image tokens between the tokens of the text, and {type(model).__name__} has none")
        self.model, self.method, self.image, self.length = model, method, image, image.shape[1]
        self.text = ~image if mask is None else ~image & mask.bool()  # [R, P]
        self.decoder = model.config.get_text_config(decoder=True)
        configs = (self.decoder, *(getattr(module, "config", None) for module in model.modules()))
        self._configs = list({id(config): config for config in configs if type(config) is type(self.decoder)}.values())
        self.layers = range(self.decoder.num_hidden_layers)[layers]
        if not self.layers:
            raise ValueError(
                f"{method} edits the layers from {layers.start} on, but the language model has {self.decoder.num_hidden_layers}: "
                "give a lower first_layer"
            )
        self._starts = self.starts()
        self._first = int(self._starts.min())
        self._called = False

    def starts(self) -> Tensor:
        """Return [R] the first token of each row whose attention is edited."""
        return self.image.new_full((len(self.image),), self.length, dtype=torch.long)

    def edit_scores(self, scores: Tensor, image: Tensor, layer: int) -> Tensor:
        """Return the edited scores [R, H, Q, K] before mask and softmax. The mask `image` [R, 1, Q, K] marks the scores to edit."""
        return scores

    def edit_weights(self, weights: Tensor, image: Tensor, layer: int) -> Tensor:
        """Return the edited weights [R, H, Q, K]. The mask `image` [R, 1, Q, K] marks the weights to edit."""
        return weights

    @contextmanager
    def on(self, length: int) -> Iterator[None]:
        """Edit the attention of passes in this context. Their sequences have `length` tokens, cached tokens included."""
        self.length = length
        names = [config._attn_implementation for config in self._configs]
        token = _active.set(self)
        try:
            for config in self._configs:
                config._attn_implementation = NAME
            yield
        finally:
            _active.reset(token)
            for config, name in zip(self._configs, names, strict=True):
                config._attn_implementation = name
        if not self._called:
            raise ValueError(
                f"{self.method} edits attention, but the language model of {type(self.model).__name__} ({self.decoder.model_type}) "
                f"takes no attention from transformers' AttentionInterface in the layers {self.layers[0]} to {self.layers[-1]}; "
                "choose a contrast such as vcd"
            )

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Compute attention as transformers calls it, with query [R, H, S, E], key and value [R, G, K, E].

        Return the output [R, S, H, E], and the weights [R, H, Q, K] of the last tokens, at least of the last token.
        """
        if unknown := [name for name in ("s_aux", "position_bias") if options.get(name) is not None]:
            raise ValueError(
                f"{self.method} cannot edit the attention of {type(self.model).__name__} ({self.decoder.model_type}), "
                f"which has {', '.join(unknown)}"
            )
        number: Any = module.layer_idx
        layer = number if number in self.layers else None
        self._called |= layer is not None
        edited = 0 if layer is None else min(query.shape[2], self.length - self._first)
        dense = query.shape[2] if options.get("softcap") else max(edited, 1)  # torch's attention knows no cap
        rows, weights = self._dense(query[:, :, -dense:], key, value, attention_mask, layer if edited > 0 else None, options)
        if dense < query.shape[2]:
            others, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options | {"output_attentions": False})
            rows = torch.cat([others[:, :-dense], rows], dim=1)
        return rows, weights

    def _dense(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layer: int | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the attention [R, Q, H, E] of the last Q tokens and its weights, edited in a layer from each row's first token on."""
        count, keys = query.shape[2], key.shape[2]
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        scores = (_by_group(query, key) @ key.transpose(2, 3) * scale).view(*query.shape[:3], keys)  # [R, H, Q, K]
        if cap := options.get("softcap"):
            scores = torch.tanh(scores / cap) * cap
        places = torch.arange(self.length - count, self.length, device=query.device)[:, None]  # [Q, 1]
        image = self.at_keys(self.image, keys) & (places >= self._starts[:, None, None, None])  # [R, 1, Q, K]
        if layer is not None:
            scores = self.edit_scores(scores, image, layer)
        if mask is None:  # causal: a sliding window keeps the last tokens
            mask = torch.arange(max(keys, self.length), device=query.device)[-keys:] <= places  # [Q, K]
        else:
            mask = mask[:, :, -count:]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32)
        if layer is not None:
            weights = self.edit_weights(weights, image, layer)
        return (_by_group(weights.to(value), key) @ value).view(*query.shape[:3], -1).transpose(1, 2), weights

    def at_keys(self, marks: Tensor, keys: int) -> Tensor:
        """Return the marks [R, P] of tokens as marks [R, 1, 1, K] of their keys.

        With a sliding window there are keys of the last tokens only; a static cache has empty places at the end.
        """
        return F.pad(marks, (0, max(keys, self.length) - marks.shape[1]))[:, None, None, -keys:]


def _by_group(rows: Tensor, key: Tensor) -> Tensor:
    """Return rows [R, H, Q, X] as [R, G, H / G * Q, X], grouped by the key-value head that they share."""
    return rows.reshape(len(rows), key.shape[1], -1, rows.shape[-1])
