"""Mixture of features: the tokens of several encoders become one token sequence for the language model.

A `Mixer` holds the encoders by name. `encode` brings their patch tokens to one common grid; `fuse`, which each fusion
defines for itself, puts them together and maps them to the width of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from encoders import Encoder

# Shapes: B images, N encoders, h x w the common grid, P = patch positions left after pooling (h*w without pooling),
# C = width of an encoder, D = width of the language model, T = tokens per image.

SSL_RATIOS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
"""The share of the self-supervised encoder in the paper's additive sweep (arXiv 2401.06209, table 2)."""


def build_projector(kind: str, width: int, hidden_size: int) -> nn.Module:
    """The adapter called `kind`, as LLaVA names them: "linear", or "mlp2x_gelu", which is linear, GELU, linear.

    Raises:
        ValueError: for another name; the number of linears and the activation (one of transformers) may be others.
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


class Mixer(nn.Module):
    """Base of the fusions: encoders of different patch size, resolution and width, brought to a common grid.

    Args:
        encoders: by name; their order is the order of fusion. One whose input size can be chosen (`flexible`) is resized to
            meet the common grid, so that no value is made up; the tokens of any other are interpolated. Mixers of different
            grids therefore need encoders of their own.
        hidden_size: D, the width of the language model.
        pool: token budget: averages over p x p neighbours, or p x q for a pair, before the adapter. A pair makes
            counts such as "two interleaved encoders against one" exactly equal: pool=(1, 2) halves them.
        grid: the common grid (rows, columns); the first encoder's unless given.
        projector: the kind of the adapters, see `build_projector`.

    Raises:
        ValueError: for no encoders, a bad name, or a grid that is empty or not divisible by `pool`.
    """

    fusion: ClassVar[str]
    encoders: Any  # an nn.ModuleDict of Encoder

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        hidden_size: int,
        *,
        pool: int | tuple[int, int] = 1,
        grid: tuple[int, int] | None = None,
        projector: str = "mlp2x_gelu",
    ) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("a mixer needs at least one encoder, got none")
        if bad := [name for name in encoders if not name or "." in name]:
            raise ValueError(f"encoder names may not be empty or hold a dot, got {bad}")
        self.hidden_size, self.projector = hidden_size, projector
        rows, columns = grid or next(iter(encoders.values())).grid
        down, across = (pool, pool) if isinstance(pool, int) else pool
        self.grid, self.pool = (rows, columns), (down, across)
        if min(rows, columns, down, across) < 1 or rows % down or columns % across:
            raise ValueError(f"a grid of {rows} x {columns} patches cannot be pooled by {down} x {across}: it must divide")
        for encoder in encoders.values():
            if encoder.flexible and rows == columns:
                encoder.resize_to(self.grid)
        self.encoders = nn.ModuleDict(encoders)
        self._grids = {name: encoder.grid for name, encoder in encoders.items()}  # as this mixer leaves them

    @property
    def positions(self) -> int:
        """P: positions of the common grid after pooling."""
        return (self.grid[0] // self.pool[0]) * (self.grid[1] // self.pool[1])

    @property
    def tokens_per_image(self) -> int:
        """T: what one image costs in the language model's context."""
        return self.positions

    @property
    def image_size(self) -> int:
        """The side of the square images to feed: the largest that any encoder looks at."""
        return max(encoder.image_size for encoder in self.encoders.values())

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's options, JSON-able."""
        return {"pool": list(self.pool), "grid": list(self.grid), "projector": self.projector}

    @property
    def spec(self) -> dict[str, Any]:
        """What `MoFConfig` records: `build_mixer(fusion, encoders, hidden_size, **fusion_options)` gives this mixer again."""
        encoders = {name: encoder.spec for name, encoder in self.encoders.items()}
        return {"fusion": self.fusion, "encoders": encoders, "fusion_options": self.options}

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B, 3, H, W], uint8 or float in [0, 1] -> each encoder's tokens [B, P, C] at the common grid, pooled.

        Raises:
            ValueError: for an encoder that was resized since: its tokens would be interpolated, which gives other values.
        """
        for name, encoder in self.encoders.items():
            if encoder.grid != (made := self._grids[name]):
                raise ValueError(
                    f"encoder {name!r} gives a {encoder.grid[0]} x {encoder.grid[1]} grid, but gave {made[0]} x {made[1]} when this "
                    "mixer was made: another mixer or resize_to has changed its input size; build a second encoder for the other use"
                )
        return {name: self._meet(*encoder(pixels)) for name, encoder in self.encoders.items()}

    def unpack(self, encoder_features: Tensor) -> dict[str, Tensor]:
        """Stored tokens [B, F] -> each encoder's tokens [B, P, C] at the common grid, pooled: as `encode`, no encoder run.

        F numbers per image: the tokens [h*w, C] of the first encoder at its own grid, flattened, then those of the next.

        Raises:
            ValueError: for an F that is not of these encoders.
        """
        shapes = {name: (rows * columns, self.encoders[name].width) for name, (rows, columns) in self._grids.items()}
        sizes = [tokens * width for tokens, width in shapes.values()]
        if encoder_features.ndim != 2 or encoder_features.shape[1] != sum(sizes):
            raise ValueError(
                f"expected stored features [B, {sum(sizes)}], the tokens x channels of {shapes}, got {list(encoder_features.shape)}"
            )
        parts = zip(shapes.items(), encoder_features.split(sizes, dim=1), strict=True)
        return {name: self._meet(part.unflatten(1, shape), self._grids[name]) for (name, shape), part in parts}

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        """Each encoder's tokens [B, P, C] -> [B, T, D]."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, T, D]."""
        return self.fuse(self.encode(pixels))

    def _meet(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens [B, grid, C] of one encoder, row by row -> [B, P, C] at the common grid, pooled."""
        if grid == self.grid and self.pool == (1, 1):
            return tokens
        maps = tokens.unflatten(1, grid).permute(0, 3, 1, 2).float()  # [B, C, rows, columns]
        if grid != self.grid:
            maps = F.interpolate(maps, self.grid, mode="bilinear", antialias=True)  # [B, C, h, w]
        maps = F.avg_pool2d(maps, self.pool)  # [B, C, h/p, w/q]
        return maps.flatten(2).transpose(1, 2).to(tokens.dtype)  # [B, P, C]

    def _ordered(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The features in the encoders' order.

        Raises:
            ValueError: when they are not this mixer's encoders, or not all at one grid.
        """
        if set(features) != set(self.encoders):
            raise ValueError(f"expected features of {list(self.encoders)}, got {list(features)}")
        counts = {name: tokens.shape[1] for name, tokens in features.items()}
        if set(counts.values()) != {self.positions}:
            raise ValueError(f"the grids do not meet: expected {self.positions} tokens of each encoder, got {counts}")
        return [features[name] for name in self.encoders]


class InterleavedMoF(Mixer):
    """One adapter per encoder, then side by side in space: token i of encoder k lands in slot N*i + k."""

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
    """The weighted sum of the features, then one adapter: `a * DINOv2 + (1 - a) * CLIP` for a in `SSL_RATIOS`.

    Args:
        weights: per encoder; equal shares unless given.

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
    """The channels of all encoders side by side, then one adapter."""

    fusion = "concat"

    def __init__(self, encoders: Mapping[str, Encoder], hidden_size: int, **options: Any) -> None:
        super().__init__(encoders, hidden_size, **options)
        self.adapter = build_projector(self.projector, sum(encoder.width for encoder in encoders.values()), hidden_size)

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.adapter(torch.cat(self._ordered(features), dim=-1))  # [B, P, N*C] -> [B, P, D]


FUSIONS: dict[str, type[Mixer]] = {mixer.fusion: mixer for mixer in (InterleavedMoF, AdditiveMoF, ConcatMoF)}


def build_mixer(fusion: str, encoders: Mapping[str, Encoder], hidden_size: int, **options: Any) -> Mixer:
    """The mixer called `fusion` ("interleaved", "additive" or "concat"); `options` are its constructor's.

    Raises:
        ValueError: for an unknown fusion.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}; expected one of {', '.join(FUSIONS)}")
    return FUSIONS[fusion](encoders, hidden_size, **options)
