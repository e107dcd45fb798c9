"""A fusion joins the tokens of several encoders to a token sequence for the language model.

Each fusion is a `Mixer`, whose `encode` brings the encoders' tokens to a common grid. The fusion's `fuse` joins them and maps them to
the width of the language model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.activations import ACT2FN

from encoders import Encoder
from mof.mixer import Mixer

# Shapes: B images, N encoders, P patch positions of the common grid, C = width of an encoder, D = width of the language model,
# Q = queries per image.

SSL_RATIOS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Shares of the self-supervised encoder in the paper's additive sweep (arXiv 2401.06209, table 2)."""


class AdaptedMixer(Mixer):
    """AdaptedMixer is the base of fusions that have an adapter for each encoder."""

    def __init__(self, encoders: Mapping[str, Encoder], hidden_size: int, **options: Any) -> None:
        super().__init__(encoders, hidden_size, **options)
        self.adapters = nn.ModuleDict({name: build_projector(self.projector, width, hidden_size) for name, width in self.widths.items()})

    def adapt(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Return N tensors of tokens [B, P, D]: the tokens [B, P, C] of each encoder, mapped by the encoder's adapter."""
        tokens = self._ordered(features)  # N of [B, P, C]
        return [adapter(t) for adapter, t in zip(self.adapters.values(), tokens, strict=True)]


class InterleavedMoF(AdaptedMixer):
    """InterleavedMoF has an adapter for each encoder and interleaves their tokens: token i of encoder k gets slot N*i + k."""

    fusion, side_by_side = "interleaved", True

    @property
    def token_places(self) -> dict[str, range]:
        return {name: range(k, self.tokens_per_image, len(self.encoders)) for k, name in enumerate(self.encoders)}

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(self.adapt(features), dim=2).flatten(1, 2)  # [B, P, N, D] -> [B, N*P, D]


class SequenceMoF(AdaptedMixer):
    """SequenceMoF has an adapter for each encoder and puts all tokens of an encoder behind the tokens of the encoder before it."""

    fusion, side_by_side = "sequence", True

    @property
    def token_places(self) -> dict[str, range]:
        return {name: range(k * self.positions, (k + 1) * self.positions) for k, name in enumerate(self.encoders)}

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        return torch.cat(self.adapt(features), dim=1)  # [B, N*P, D]


class AdditiveMoF(Mixer):
    """AdditiveMoF adds the weighted features before a single adapter: `a * DINOv2 + (1 - a) * CLIP` for a in `SSL_RATIOS`.

    Args:
        weights: encoder -> weight; by default all weights are equal and have the sum 1.

    Raises:
        ValueError: for encoders of different width, or weights that do not give each encoder a finite number.
    """

    fusion = "additive"

    def __init__(
        self, encoders: Mapping[str, Encoder], hidden_size: int, *, weights: Mapping[str, float] | None = None, **options: Any
    ) -> None:
        super().__init__(encoders, hidden_size, **options)
        if len(set(self.widths.values())) > 1:
            raise ValueError(f"features of different widths cannot be added: {self.widths}; use interleaved or concat")
        weights = dict.fromkeys(encoders, 1 / len(encoders)) if weights is None else weights
        if set(weights) != set(encoders) or not all(map(math.isfinite, weights.values())):
            raise ValueError(f"expected one finite weight for each of {list(encoders)}, got {dict(weights)}")
        self.weights = {name: float(weights[name]) for name in encoders}
        self.adapter = build_projector(self.projector, next(iter(self.widths.values())), hidden_size)

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"weights": self.weights}

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        tokens = self._ordered(features)  # N of [B, P, C]
        mixed = sum(weight * t for weight, t in zip(self.weights.values(), tokens, strict=True))  # [B, P, C]
        return self.adapter(mixed)  # [B, P, D]


class ConcatMoF(Mixer):
    """ConcatMoF puts the channels of all encoders side by side before a single adapter."""

    fusion = "concat"

    def __init__(self, encoders: Mapping[str, Encoder], hidden_size: int, **options: Any) -> None:
        super().__init__(encoders, hidden_size, **options)
        self.adapter = build_projector(self.projector, sum(self.widths.values()), hidden_size)

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.adapter(torch.cat(self._ordered(features), dim=-1))  # [B, P, N*C] -> [B, P, D]


class GatedMoF(AdaptedMixer):
    """GatedMoF has an adapter for each encoder and adds the tokens of a position with weights.

    A linear gate computes the weights from the features of all encoders at this position. It starts with equal weights.
    """

    fusion = "gated"

    def __init__(self, encoders: Mapping[str, Encoder], hidden_size: int, **options: Any) -> None:
        super().__init__(encoders, hidden_size, **options)
        self.gate = nn.Linear(sum(self.widths.values()), len(encoders))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        weights = self.gate(torch.cat(self._ordered(features), dim=-1)).softmax(-1)  # [B, P, N*C] -> [B, P, N]
        tokens = torch.stack(self.adapt(features), dim=2)  # [B, P, N, D]
        return (weights.unsqueeze(-1) * tokens).sum(2)  # [B, P, D]


class CrossAttentionMoF(AdaptedMixer):
    """CrossAttentionMoF has an adapter for each encoder, and a learnt query for each window of the grid.

    The query attends to the tokens of all encoders in its window. This is the simplest form of the spatial vision aggregator of
    Cambrian-1 (arXiv 2406.16860, section 3).

    Args:
        window: rows and columns of the (pooled) grid that a query reads, or a number for both. The image has a token for each window.
        heads: the number of heads of the attention, a divisor of `hidden_size`.

    Raises:
        ValueError: for a window that does not divide the grid, or heads that do not divide `hidden_size`.
    """

    fusion = "cross_attention"

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        hidden_size: int,
        *,
        window: int | tuple[int, int] = (1, 1),
        heads: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(encoders, hidden_size, **options)
        down, across = (window, window) if isinstance(window, int) else window
        rows, columns = self.token_grid  # of windows of 1 x 1
        if min(down, across) < 1 or rows % down or columns % across:
            raise ValueError(f"a window of {down} x {across} must divide the grid of {rows} x {columns} tokens")
        if heads < 1 or hidden_size % heads:
            raise ValueError(f"{heads} heads must divide hidden_size {hidden_size}")
        self.window, self.heads = (down, across), heads
        self.queries = nn.Parameter(torch.randn(self.tokens_per_image, hidden_size) * hidden_size**-0.5)  # [Q, D]
        self.attention = nn.MultiheadAttention(hidden_size, heads, batch_first=True)

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"window": list(self.window), "heads": self.heads}

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        tokens = torch.stack(self.adapt(features), dim=2)  # [B, P, N, D]
        sizes = {"i": self.window[0], "j": self.window[1], "c": self.token_grid[1]}
        windows = rearrange(tokens, "b (r i c j) n d -> (b r c) (i j n) d", **sizes)  # [B*Q, tokens of a window, D]
        queries = self.queries.repeat(len(tokens), 1).unsqueeze(1)  # [B*Q, 1, D]
        fused, _ = self.attention(queries, windows, windows, need_weights=False)  # [B*Q, 1, D]
        return fused.view(len(tokens), self.tokens_per_image, self.hidden_size)  # [B, Q, D]


FUSIONS: dict[str, type[Mixer]] = {
    mixer.fusion: mixer for mixer in (InterleavedMoF, SequenceMoF, AdditiveMoF, GatedMoF, ConcatMoF, CrossAttentionMoF)
}


def build_mixer(fusion: str, encoders: Mapping[str, Encoder], hidden_size: int, **options: Any) -> Mixer:
    """Return the mixer for a fusion, which is a key of `FUSIONS`, built with the options of its constructor.

    Raises:
        ValueError: for an unknown fusion.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}; expected one of {', '.join(FUSIONS)}")
    return FUSIONS[fusion](encoders, hidden_size, **options)


def build_projector(kind: str, width: int, hidden_size: int) -> nn.Module:
    """Return an adapter by LLaVA's name: "linear", or "mlp2x_gelu", which is linear, GELU, linear.

    "mlp3x_silu" has three linear layers and another activation, which has its name in transformers.

    Raises:
        ValueError: for an unknown name.
    """
    if kind == "linear":
        return nn.Linear(width, hidden_size)
    match = re.fullmatch(r"mlp([1-9])x_(\w+)", kind)
    if match is None or match[2] not in ACT2FN:
        raise ValueError(f"unknown projector {kind!r}; expected 'linear', or linears and activation such as 'mlp2x_gelu'")
    layers: list[nn.Module] = [nn.Linear(width, hidden_size)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU() if match[2] == "gelu" else ACT2FN[match[2]], nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
