"""A fusion joins the tokens of several encoders to a token sequence for the language model.

Each fusion is a `Mixer`, whose `encode` brings the encoders' tokens to a common grid. The fusion's `fuse` joins them and maps them to
the width of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from encoders import Encoder
from mof.mixer import Mixer

# Shapes: B images, N encoders, P patch positions of the common grid, C = width of an encoder, D = width of the language model.

SSL_RATIOS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Shares of the self-supervised encoder in the paper's additive sweep (arXiv 2401.06209, table 2)."""


class InterleavedMoF(Mixer):
    """InterleavedMoF has an adapter for each encoder and interleaves their tokens: token i of encoder k gets slot N*i + k."""

    fusion = "interleaved"

    def __init__(self, encoders: Mapping[str, Encoder], hidden_size: int, **options: Any) -> None:
        super().__init__(encoders, hidden_size, **options)
        self.adapters = nn.ModuleDict({name: build_projector(self.projector, e.width, hidden_size) for name, e in encoders.items()})

    @property
    def tokens_per_image(self) -> int:
        return len(self.encoders) * self.positions

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        tokens = self._ordered(features)  # N of [B, P, C]
        adapted = [adapter(t) for adapter, t in zip(self.adapters.values(), tokens, strict=True)]  # N of [B, P, D]
        return torch.stack(adapted, dim=2).flatten(1, 2)  # [B, P, N, D] -> [B, N*P, D]


class AdditiveMoF(Mixer):
    """AdditiveMoF adds the weighted features before a single adapter: `a * DINOv2 + (1 - a) * CLIP` for a in `SSL_RATIOS`.

    Args:
        weights: encoder -> weight; by default all weights are equal and have the sum 1.

    Raises:
        ValueError: for encoders of different width, or weights that do not name exactly the encoders.
    """

    fusion = "additive"

    def __init__(
        self, encoders: Mapping[str, Encoder], hidden_size: int, *, weights: Mapping[str, float] | None = None, **options: Any
    ) -> None:
        super().__init__(encoders, hidden_size, **options)
        widths = {name: encoder.width for name, encoder in encoders.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"features of different widths cannot be added: {widths}; use interleaved or concat")
        weights = dict.fromkeys(encoders, 1 / len(encoders)) if weights is None else weights
        if set(weights) != set(encoders):
            raise ValueError(f"expected one weight for each of {list(encoders)}, got {dict(weights)}")
        self.weights = {name: float(weights[name]) for name in encoders}
        self.adapter = build_projector(self.projector, next(iter(widths.values())), hidden_size)

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
        self.adapter = build_projector(self.projector, sum(encoder.width for encoder in encoders.values()), hidden_size)

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.adapter(torch.cat(self._ordered(features), dim=-1))  # [B, P, N*C] -> [B, P, D]


FUSIONS: dict[str, type[Mixer]] = {mixer.fusion: mixer for mixer in (InterleavedMoF, AdditiveMoF, ConcatMoF)}


def build_mixer(fusion: str, encoders: Mapping[str, Encoder], hidden_size: int, **options: Any) -> Mixer:
    """Return the mixer for a fusion ("interleaved", "additive" or "concat"), built with the options of its constructor.

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
