"""Edits of attention: PAI adds to the scores of image tokens, VAR takes weight from image tokens that are attention sinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vig.decoding.attention import EditedAttention
from vig.decoding.contrasts import Contrast, plausible
from vig.decoding.method import Decoding

# Shapes: R rows of a batch (records times beams), P tokens of a prompt, H heads, Q edited query tokens, K keys, D channels of a token.


@dataclass(frozen=True, kw_only=True)
class AttentionEdit(Decoding):
    """A method that edits the attention of the language model's layers, counted from 0."""

    needs_sinks: ClassVar[bool] = False
    first_layer: int = 2

    @property
    def edits(self) -> bool:
        """Whether the options leave something to edit."""
        raise NotImplementedError

    def attention(self, model: PreTrainedModel, input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> EditedAttention | None:
        """Return the edited attention for prompts [R, P]; None for prompts without images. ValueError for an unfit model."""
        return EditedAttention.of(model, input_ids, self, model_kwargs) if self.edits else None

    def layers(self, count: int) -> range:
        """Return the edited layers of a language model with `count` layers."""
        return range(self.first_layer, count)

    def check_width(self, width: int) -> None:
        """Raise a ValueError for a language model of a width that the method cannot edit."""

    def starts(self, image: Tensor) -> Tensor:
        """Return [R] the first token whose attention is edited, for image tokens [R, P] of a prompt."""
        raise NotImplementedError

    def edit_scores(self, scores: Tensor, image: Tensor) -> Tensor:
        """Return the edited scores [R, H, Q, K] before the mask and the softmax; `image` [R, 1, Q, K] marks what is to be edited."""
        return scores

    def edit_weights(self, weights: Tensor, image: Tensor, sinks: Tensor) -> Tensor:
        """Return the edited weights [R, H, Q, K]; `sinks` [R, 1, Q, K] marks the image tokens that are sinks."""
        return weights

    def find_sinks(self, states: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """Return [R, P] whether an image token is an attention sink, by the layer's input [R, P, D] and image and text tokens [R, P]."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PAI(AttentionEdit, Contrast):
    """Paying attention to the image (arXiv 2407.21771): attention, then guidance. alpha 0 or gamma 1 leaves out a part.

    Attention: the scores w of image tokens become w + alpha |w|, for the last token of the prompt and all generated tokens.
    Guidance: gamma (log p - log p') + log p', among tokens with p >= beta max p, without the image in the null branch.
    """

    name: ClassVar[str] = "pai"
    alpha: float = 0.2
    gamma: float = 1.1
    beta: float = 0.1

    @property
    def contrasts(self) -> bool:
        return self.gamma != 1

    @property
    def edits(self) -> bool:
        return self.alpha != 0

    def combine(self, logits: Tensor, null_logits: Tensor, step: int) -> Tensor:
        p, null_p = logits.log_softmax(dim=-1), null_logits.log_softmax(dim=-1)
        return plausible(self.gamma * (p - null_p) + null_p, p, self.beta)

    def starts(self, image: Tensor) -> Tensor:
        return torch.full_like(image[:, 0], image.shape[1] - 1, dtype=torch.long)

    def edit_scores(self, scores: Tensor, image: Tensor) -> Tensor:
        return scores + self.alpha * scores.abs() * image


@dataclass(frozen=True, kw_only=True)
class VAR(AttentionEdit):
    """Visual attention redistribution (arXiv 2503.03321): image tokens that are attention sinks give to the other image tokens.

    An image token is a sink if |RMSNorm(h)| exceeds `tau` in a sink dimension. Sinks keep `keep` of their weight in heads that look at
    the image: image tokens have at least `mass` of the attention, and sinks at most `rho` of that. Edited are all tokens behind the
    last image, in all layers but the first two and the last.

    Sink dimensions are found in each layer and prompt: those in which a token of the text exceeds tau, as the first token of most
    language models does.
    """

    name: ClassVar[str] = "var"
    needs_sinks: ClassVar[bool] = True
    tau: float = 20.0
    rho: float = 0.5
    mass: float = 0.2
    keep: float = 0.6

    @property
    def edits(self) -> bool:
        return self.keep != 1

    def layers(self, count: int) -> range:
        return range(self.first_layer, count - 1)

    def check_width(self, width: int) -> None:
        if self.tau >= width**0.5:
            raise ValueError(
                f"no |RMSNorm(h)| of a language model {width} wide exceeds {width**0.5:.1f}, so nothing would change: "
                f"give a smaller tau than {self.tau}"
            )

    def starts(self, image: Tensor) -> Tensor:
        behind = torch.arange(1, image.shape[1] + 1, device=image.device) * image  # [R, P]
        return behind.amax(dim=1).where(image.any(dim=1), image.shape[1])

    def find_sinks(self, states: Tensor, image: Tensor, text: Tensor) -> Tensor:
        states = states.float()
        large = (states * (states.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()).abs() > self.tau  # [R, P, D]
        dimensions = (large & text[..., None]).any(dim=1, keepdim=True)  # [R, 1, D]
        return (large & dimensions).any(dim=-1) & image  # [R, P]

    def edit_weights(self, weights: Tensor, image: Tensor, sinks: Tensor) -> Tensor:
        taken, others = weights * sinks, weights * (image & ~sinks)  # [R, H, Q, K]
        sunk, rest = taken.sum(dim=-1, keepdim=True), others.sum(dim=-1, keepdim=True)  # [R, H, Q, 1]
        chosen = (sunk + rest >= self.mass) & (sunk <= self.rho * (sunk + rest)) & (rest > 0)
        given = (1 - self.keep) * (sunk * others / rest.clamp(min=1e-9) - taken)  # [R, H, Q, K]
        return weights + given * chosen
