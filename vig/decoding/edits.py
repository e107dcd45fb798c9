"""Two methods edit attention: PAI adds to the scores of image tokens, VAR takes weight from image tokens that are attention sinks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vig.decoding.attention import EditedAttention
from vig.decoding.contrasts import Contrast, plausible
from vig.decoding.method import Decoding

# Shapes: R rows of a batch (records times beams), P tokens of a prompt, H heads, Q edited query tokens, K keys, D channels of a token.


@dataclass(frozen=True, kw_only=True)
class PAI(Contrast):
    """PAI (arXiv 2407.21771) edits the attention, unless alpha is 0, and guides the logits, unless gamma is 1.

    Attention: the scores w of image tokens become w + alpha |w|, for the last token of the prompt and all generated tokens, in the
    layers from `first_layer` on (counted from 0).
    Guidance: gamma (log p - log p') + log p', among tokens with p >= beta max p, without the image in the null branch.
    """

    name: ClassVar[str] = "pai"
    plain: ClassVar[tuple[str, float]] = ("gamma", 1.0)
    first_layer: int = 2
    alpha: float = 0.2
    gamma: float = 1.1
    beta: float = 0.1

    def combine(self, logits: Tensor, null_logits: Tensor, step: int) -> Tensor:
        p, null_p = logits.log_softmax(dim=-1), null_logits.log_softmax(dim=-1)
        return plausible(self.gamma * (p - null_p) + null_p, p, self.beta)

    def attention(self, model: PreTrainedModel, input_ids: Tensor, inputs: Mapping[str, Any]) -> EditedAttention | None:
        return _Amplified(self, model, input_ids, inputs) if self.alpha else None


class _Amplified(EditedAttention):
    """_Amplified edits the attention for PAI."""

    def __init__(self, options: PAI, model: PreTrainedModel, input_ids: Tensor, inputs: Mapping[str, Any]) -> None:
        super().__init__(model, options.name, input_ids, inputs, slice(options.first_layer, None))
        self._alpha = options.alpha

    def starts(self) -> Tensor:
        return super().starts() - 1  # the last token of the prompt

    def edit_scores(self, scores: Tensor, image: Tensor, layer: int) -> Tensor:
        return scores + self._alpha * scores.abs() * image


@dataclass(frozen=True, kw_only=True)
class VAR(Decoding):
    """VAR (arXiv 2503.03321) redistributes visual attention: image tokens that are attention sinks give to the other image tokens.

    An image token is a sink if |RMSNorm(h)| exceeds `tau` in a sink dimension. Sinks keep `keep` of their weight in heads that look at
    the image: image tokens have at least `mass` of the attention, and sinks at most `rho` of that. All tokens behind the last image are
    edited, in all layers from `first_layer` on (counted from 0) except the last.

    The sink dimensions of a layer and prompt are those in which a token of the text exceeds tau, as the first token does in most
    language models.
    """

    name: ClassVar[str] = "var"
    first_layer: int = 2
    tau: float = 20.0
    rho: float = 0.5
    mass: float = 0.2
    keep: float = 0.6

    def attention(self, model: PreTrainedModel, input_ids: Tensor, inputs: Mapping[str, Any]) -> EditedAttention | None:
        return _Redistributed(self, model, input_ids, inputs) if self.keep != 1 else None


class _Redistributed(EditedAttention):
    """_Redistributed edits the attention for VAR."""

    def __init__(self, options: VAR, model: PreTrainedModel, input_ids: Tensor, inputs: Mapping[str, Any]) -> None:
        super().__init__(model, options.name, input_ids, inputs, slice(options.first_layer, -1))
        self._options = options
        self._sinks: dict[int, Tensor] = {}  # layer -> [R, P]
        if options.tau >= (width := self.decoder.hidden_size) ** 0.5:
            raise ValueError(
                f"no |RMSNorm(h)| of a language model {width} wide exceeds {width**0.5:.1f}, so nothing would change: "
                f"give a smaller tau than {options.tau}"
            )

    def starts(self) -> Tensor:
        behind = torch.arange(1, self.length + 1, device=self.image.device) * self.image  # [R, P]
        return behind.amax(dim=1).where(self.image.any(dim=1), self.length)  # behind the last image

    @contextmanager
    def on(self, length: int) -> Iterator[None]:
        """Edit the attention, and find the sinks in passes on whole sequences, by the inputs of the layers."""
        with ExitStack() as hooks, super().on(length):
            for name, module in self.model.named_modules():
                of_decoder = type(getattr(module, "config", None)) is type(self.decoder) and "Attention" in type(module).__name__
                if of_decoder and getattr(module, "layer_idx", -1) in self.layers:
                    parent = self.model.get_submodule(name.rpartition(".")[0])
                    hooks.callback(parent.register_forward_pre_hook(self._finder(module.layer_idx), with_kwargs=True).remove)
            yield

    def _finder(self, layer: int) -> Any:
        def find(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]  # [R, S, D]
            if states.shape[1] == self.length:  # the whole sequence, with all images
                self._sinks[layer] = self.find_sinks(states[:, : self.image.shape[1]].float())
            elif layer not in self._sinks:
                raise ValueError(
                    f"{self.method} looks for sinks in the whole prompt, but layer {layer} of the language model "
                    f"({self.decoder.model_type}) reads only the end of it: give the whole prompt without a cache, and no model that "
                    "leaves tokens out in its last layers"
                )

        return find

    def find_sinks(self, states: Tensor) -> Tensor:
        """Return a mask [R, P] of the image tokens that are attention sinks, given a layer's input [R, P, D]."""
        large = (states * (states.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()).abs() > self._options.tau  # [R, P, D]
        dimensions = (large & self.text[..., None]).any(dim=1, keepdim=True)  # [R, 1, D]
        return (large & dimensions).any(dim=-1) & self.image

    def edit_weights(self, weights: Tensor, image: Tensor, layer: int) -> Tensor:
        sinks = self.at_keys(self._sinks[layer], weights.shape[-1]) & image  # [R, 1, Q, K]
        taken, others = weights * sinks, weights * (image & ~sinks)  # [R, H, Q, K]
        sunk, rest = taken.sum(dim=-1, keepdim=True), others.sum(dim=-1, keepdim=True)  # [R, H, Q, 1]
        chosen = (sunk + rest >= self._options.mass) & (sunk <= self._options.rho * (sunk + rest)) & (rest > 0)
        given = (1 - self._options.keep) * (sunk * others / rest.clamp(min=1e-9) - taken)  # [R, H, Q, K]
        return weights + given * chosen
