"""Mixer is the base of the fusions. It brings the tokens of several encoders to a common grid. `mof.adapter` holds the fusions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from encoders import Encoder

# Shapes: B images, h x w the common grid, P = patch positions after pooling (h*w without pooling), C = width of an encoder,
# F = numbers that a feature store holds per image, D = width of the language model, T = tokens per image.


class Mixer(nn.Module):
    """A mixer holds encoders by name, with different patch sizes, resolutions and widths. A fusion is a subclass that defines `fuse`.

    Args:
        encoders: name -> encoder, in the order of fusion. An encoder whose input size can be chosen (`flexible`) is resized to
            the common grid, so that its tokens need no interpolation; the tokens of other encoders are interpolated. Mixers with
            different grids therefore cannot share encoders.
        hidden_size: D, the width of the language model's token embeddings, mostly its hidden size.
        pool: tokens of p x p neighbours, or p x q for a pair, are averaged before the adapter. pool=(1, 2) halves the tokens, so
            that two interleaved encoders need as many tokens as a single encoder.
        unshuffle: put the channels of these neighbours side by side instead of averaging them, so that no number is lost (the pixel
            unshuffle of InternVL). The adapters then read p * q times as many channels.
        grid: the common grid (rows, columns); by default the grid of the first encoder.
        projector: the kind of the adapters, see `mof.adapter.build_projector`.
        weigh_layers: if an encoder returns several layers side by side (`layer=[-2, -5]`), the layers are added with learnt
            weights, so that their sum replaces all their channels. The weights are a softmax that starts with equal shares.

    Raises:
        ValueError: for no encoders, a bad name, or a grid that is empty or not divisible by `pool`; with `weigh_layers`, for
            layers of different widths.
    """

    fusion: ClassVar[str]
    side_by_side: ClassVar[bool] = False  # whether each encoder has tokens of its own
    window: tuple[int, int] = (1, 1)  # rows and columns of the pooled grid that a token is made of
    encoders: Any  # an nn.ModuleDict of Encoder

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        hidden_size: int,
        *,
        pool: int | tuple[int, int] = 1,
        grid: tuple[int, int] | None = None,
        projector: str = "mlp2x_gelu",
        weigh_layers: bool = False,
        unshuffle: bool = False,
    ) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("a mixer needs at least one encoder, got none")
        if bad := [name for name in encoders if not name or "." in name or hasattr(nn.ModuleDict(), name)]:
            raise ValueError(f"encoder names may not be empty, hold a dot or be a name of torch's ModuleDict, as 'keys' is, got {bad}")
        self.hidden_size, self.projector = hidden_size, projector
        rows, columns = grid or next(iter(encoders.values())).grid
        down, across = (pool, pool) if isinstance(pool, int) else pool
        self.grid, self.pool, self.unshuffle = (rows, columns), (down, across), unshuffle
        if min(rows, columns, down, across) < 1 or rows % down or columns % across:
            raise ValueError(f"a grid of {rows} x {columns} patches cannot be pooled by {down} x {across}: it must divide")
        for encoder in encoders.values():
            if encoder.flexible and rows == columns:
                encoder.resize_to(self.grid)
        self.encoders = nn.ModuleDict(encoders)
        self._grids = {name: encoder.grid for name, encoder in encoders.items()}  # kept to notice when an encoder is resized later
        self.layer_weights = nn.ParameterDict()
        if weigh_layers:
            for name, encoder in encoders.items():
                if len(set(encoder.layer_widths)) > 1:
                    raise ValueError(f"the layers {encoder.layer} of encoder {name!r} differ in width and cannot be added")
                self.layer_weights[name] = nn.Parameter(torch.zeros(len(encoder.layers)))

    def __repr__(self) -> str:
        adapters = sum(parameter.numel() for name, parameter in self.named_parameters() if not name.startswith("encoders."))
        name, grid, pool = type(self).__name__, " x ".join(map(str, self.grid)), " x ".join(map(str, self.pool))
        way = "unshuffled" if self.unshuffle else "pooled"
        lines = [
            f"{name}: {self.tokens_per_image} tokens of {self.hidden_size} channels for an image of {self.image_size} pixels",
            f"  {grid} grid, {way} {pool}; adapters {self.projector}, {adapters / 1e6:,.2f} M parameters",
        ]
        for name, encoder in self.encoders.items():
            grid, state = " x ".join(map(str, encoder.grid)), "frozen" if encoder.frozen else "trainable"
            lines.append(f"  {name}: {encoder.name}, {encoder.image_size} pixels, {grid} tokens of {encoder.width} channels, {state}")
        return "\n".join(lines)

    @property
    def widths(self) -> dict[str, int]:
        """Return encoder -> the number of channels that its adapter reads: C, or p * q * C with `unshuffle`."""
        layers = {name: len(weights) for name, weights in self.layer_weights.items()}
        neighbours = math.prod(self.pool) if self.unshuffle else 1
        return {name: neighbours * encoder.width // layers.get(name, 1) for name, encoder in self.encoders.items()}

    @property
    def positions(self) -> int:
        """Return P, the number of positions of the common grid after pooling."""
        return (self.grid[0] // self.pool[0]) * (self.grid[1] // self.pool[1])

    @property
    def token_grid(self) -> tuple[int, int]:
        """Return the rows and columns of the tokens of an image; encoders side by side share a place."""
        return self.grid[0] // self.pool[0] // self.window[0], self.grid[1] // self.pool[1] // self.window[1]

    @property
    def tokens_per_image(self) -> int:
        """Return T, the number of tokens of an image in the language model's context."""
        return math.prod(self.token_grid) * (len(self.encoders) if self.side_by_side else 1)

    @property
    def token_places(self) -> dict[str, range]:
        """Return encoder's name -> the places of its tokens among the T tokens of an image, in row-major order.

        Encoders whose features are fused into the same tokens share an entry, "clip + dinov2".
        """
        return {" + ".join(self.encoders): range(self.tokens_per_image)}

    @property
    def image_size(self) -> int:
        """Return the side of the square input images in pixels, which is the largest input size of the encoders."""
        return max(encoder.image_size for encoder in self.encoders.values())

    @property
    def options(self) -> dict[str, Any]:
        """Return the constructor's options (JSON-able)."""
        options = {"pool": list(self.pool), "grid": list(self.grid), "projector": self.projector}
        return options | ({"weigh_layers": True} if self.layer_weights else {}) | ({"unshuffle": True} if self.unshuffle else {})

    @property
    def spec(self) -> dict[str, Any]:
        """Return entries for `MoFConfig`: `build_mixer(fusion, encoders, hidden_size, **fusion_options)` builds this mixer again."""
        encoders = {name: encoder.spec for name, encoder in self.encoders.items()}
        return {"fusion": self.fusion, "encoders": encoders, "fusion_options": self.options}

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return each encoder's tokens [B, P, C] at the common grid, pooled, for pixels [B, 3, H, W], uint8 or float in [0, 1].

        Raises:
            ValueError: for an encoder that was resized after this mixer was made, because interpolation would change its tokens.
        """
        for name, encoder in self.encoders.items():
            if encoder.grid != (made := self._grids[name]):
                raise ValueError(
                    f"encoder {name!r} gives a {encoder.grid[0]} x {encoder.grid[1]} grid, but gave {made[0]} x {made[1]} when this "
                    "mixer was made: another mixer or resize_to has changed its input size; build a second encoder for the other use"
                )
        return {name: self._meet(*encoder(pixels)) for name, encoder in self.encoders.items()}

    def unpack(self, encoder_features: Tensor) -> dict[str, Tensor]:
        """Return each encoder's tokens [B, P, C] as `encode` does, but from stored tokens [B, F], without running an encoder.

        The F numbers of an image are the flattened tokens [h*w, C] of the first encoder on its own grid, then the tokens of the
        next encoder.

        Raises:
            ValueError: for an F that does not fit these encoders.
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
        """Return the image tokens [B, T, D] for each encoder's tokens [B, P, C]."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the image tokens [B, T, D] of pixels [B, 3, H, W]."""
        return self.fuse(self.encode(pixels))

    def _meet(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return tokens [B, P, C] at the common grid, pooled, for an encoder's tokens [B, rows*columns, C] on its own grid."""
        if grid == self.grid and self.pool == (1, 1):
            return tokens
        maps = tokens.unflatten(1, grid).permute(0, 3, 1, 2).float()  # [B, C, rows, columns]
        if grid != self.grid:
            maps = F.interpolate(maps, self.grid, mode="bilinear", antialias=True)  # [B, C, h, w]
        if self.unshuffle:
            p, q = self.pool
            return rearrange(maps, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q).to(tokens.dtype)  # [B, P, C * p * q]
        maps = F.avg_pool2d(maps, self.pool)  # [B, C, h/p, w/q]
        return maps.flatten(2).transpose(1, 2).to(tokens.dtype)  # [B, P, C]

    def _ordered(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the features [B, P, C] in the order of the encoders, with layers added if they are weighed.

        Raises:
            ValueError: for features of other encoders, or features that are not on the common grid.
        """
        if set(features) != set(self.encoders):
            raise ValueError(f"expected features of {list(self.encoders)}, got {list(features)}")
        counts = {name: tokens.shape[1] for name, tokens in features.items()}
        if set(counts.values()) != {self.positions}:
            raise ValueError(f"the grids do not meet: expected {self.positions} tokens of each encoder, got {counts}")
        return [self._weighed(name, features[name]) for name in self.encoders]

    def _weighed(self, encoder: str, tokens: Tensor) -> Tensor:
        """Return the weighted sum [B, P, C] of an encoder's layers [B, P, layers * C], or the tokens as they are.

        Unshuffling keeps the channels of a layer together.
        """
        if encoder not in self.layer_weights:
            return tokens
        weights = self.layer_weights[encoder].softmax(0).to(tokens)  # [layers]
        return torch.einsum("bplc,l->bpc", tokens.unflatten(-1, (len(weights), -1)), weights)
