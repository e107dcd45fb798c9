"""The contract that every encoder keeps, whatever library its weights come from."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.images.reading import read_image
from encoders.preprocessing import Preprocessing

# Shapes: B = images, H, W = rows and columns of the given pixels, S = side of the encoder's input, h, w = rows and
# columns of its patch grid, D = width (of all chosen layers together), T = texts, E = width of the joint embedding.


class PatchFeatures(NamedTuple):
    """Patch tokens in row-major order, and the grid they lie on."""

    tokens: Tensor  # [B, h*w, D]
    grid: tuple[int, int]  # (h, w)


class Encoder(nn.Module, ABC):
    """A vision network that takes plain pixels and gives the patch tokens of a layer, or of several layers side by side.

    Resizing, normalisation, class and register tokens, the choice of the layer and position interpolation happen here and
    nowhere else. A subclass hands its backend's model to `__init__` and implements `patch_tokens` and `image_embedding` (and
    `text_embedding`, `change_input_size` where it can).

    Attributes:
        tower: the backend's own model, with a text tower if there is one.
        width, patch_size: D, and the side of a patch in pixels.
        preprocessing: the steps of the backend's own processor, with `image_size`, `mean` and `std`.
        prefix_tokens: class and register tokens, which come before the patch tokens in the tower and are cut off.
        embed_dim: E, or None when the model has no embedding of a whole image.
        layer: the layer whose output `forward` gives: -1 is the last block, -2 the block before it, k >= 1 the k-th block,
            0 the embeddings. The default is -2 for a transformer with a text tower, else -1. The channels of several layers
            stand side by side, in their order. A "block" of a convolutional network is a stage.
        norm: whether the tower's final norm is applied to that output. By default it is not.
        layers: the same layers counted from the front: the number of blocks that run before each is read.
        layer_widths: the channels of each of these layers; their sum is D.
        blocks: the number of blocks that `forward` runs, the largest of `layers`.
        flexible: whether other input sizes are possible.
        has_text: whether there is a text tower.
        frozen: no gradient, always in eval mode. The default.
    """

    tower: Any
    # A subclass overrides these, in its `__init__` where its models differ.
    prefix_tokens: int = 0
    flexible: bool = False
    has_text: bool = False

    def __init__(
        self,
        tower: nn.Module,
        *,
        width: int | Mapping[int, int],
        depth: int,
        patch_size: int | Mapping[int, int],
        embed_dim: int | None = None,
        layer: int | Sequence[int] | None = None,
        norm: bool | None = None,
        trainable: bool = False,
        **preprocessing: Any,
    ) -> None:
        """Take over the backend's model.

        Args:
            width, patch_size: a number for all layers, or a number by layer (counted from the front) where they differ.
            depth: the number of blocks.
            embed_dim, layer, norm, trainable: see the class.
            **preprocessing: the fields of `Preprocessing`: image_size, mean, std and any field that differs from its default.
        """
        super().__init__()
        widths, strides = _by_layer(width, depth), _by_layer(patch_size, depth)
        if layer is None:  # LLaVA's choice for CLIP, MMVP's for DINOv2; the stages of convolutional networks differ
            layer = -2 if self.has_text and len(set(strides.values())) == 1 else -1
        self.layers = _counted(layer, depth, widths, bool(norm))
        if len({strides[number] for number in self.layers}) > 1:
            raise ValueError(f"layers {layer} lie on grids of different strides ({strides}): their tokens cannot stand side by side")
        self.name = type(self).__name__  # build_encoder replaces it by the given name
        self.weights: str | None = None  # build_encoder writes the weight file and the config, where they are given
        self.config: dict[str, Any] | None = None
        self.layer_widths = tuple(widths[number] for number in self.layers)
        self.width, self.patch_size = sum(self.layer_widths), strides[self.layers[0]]
        self.embed_dim = embed_dim
        self.preprocessing = Preprocessing(**preprocessing)
        self.declared_statistics = self.mean, self.std  # `spec` records only others
        self.layer = layer if isinstance(layer, int) else list(layer)
        self.norm, self.blocks = bool(norm), max(self.layers)
        self.frozen = not trainable
        self.tower = tower.requires_grad_(trainable)
        self.eval()

    def __repr__(self) -> str:
        parameters = list(self.parameters())
        layers = ", ".join(map(str, self.layers))
        embedding = f"embedding of {self.embed_dim} numbers" if self.embed_dim else "no embedding"
        count = sum(parameter.numel() for parameter in parameters)
        place = f", {parameters[0].dtype}, {parameters[0].device}" if parameters else ""
        return (
            f"{type(self).__name__} {self.name}\n"
            f"  {self.image_size} x {self.image_size} pixels -> {self.grid[0]} x {self.grid[1]} tokens of {self.width} channels\n"
            f"  tokens after block {layers}{', normed' if self.norm else ''}; {embedding}; {'' if self.has_text else 'no '}text tower\n"
            f"  {count / 1e6:,.1f} M parameters, {'frozen' if self.frozen else 'trainable'}{place}"
        )

    @property
    def image_size(self) -> int:
        """S, in pixels."""
        return self.preprocessing.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean per channel, of pixels in [0, 1], that is subtracted."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation per channel that is divided by."""
        return self.preprocessing.std

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the tokens that `forward` gives."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def spec(self) -> dict[str, Any]:
        """JSON-able arguments: `build_encoder(**spec)` builds this encoder again, but for weights that were trained since."""
        spec: dict[str, Any] = {
            "name": self.name,
            "image_size": self.image_size,
            "layer": self.layer,
            "norm": self.norm,
            "trainable": not self.frozen,
        }
        if self.weights is not None:
            spec["weights"] = self.weights
        if self.config is not None:
            spec["config"] = self.config
        if (self.mean, self.std) != self.declared_statistics:
            spec |= {"mean": list(self.mean), "std": list(self.std)}
        return spec

    def pixels(self, image: str | os.PathLike[str] | Image.Image) -> Tensor:
        """Return a file or an image as [3, S, S] uint8, cropped and resized like the backend's own processor does it.

        Raises:
            ImageError: naming the file that cannot be read.
        """
        return self.preprocessing.pixels(read_image(image))  # [3, S, S]

    def forward(self, pixels: Tensor) -> PatchFeatures:
        """pixels [B, 3, H, W], uint8 or float in [0, 1] -> tokens [B, h*w, D]. No block after `layer` runs."""
        with self._gradients():
            return self._on_grid(self.patch_tokens(self.prepare(pixels)))  # [B, h*w, D]

    def embed_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] as for `forward` -> [B, E] float32 of unit norm, through the whole tower.

        CLIP-like models: the projected embedding that is compared with texts. DINOv2: the normalised class token.
        """
        self._check_embeds()
        with self._gradients():
            return F.normalize(self.image_embedding(self.prepare(pixels)).float(), dim=-1)  # [B, E]

    def embed_with_tokens(self, pixels: Tensor) -> tuple[Tensor, PatchFeatures]:
        """Return both `embed_image(pixels)` and `self(pixels)`, from one pass through the tower where the backend can do that."""
        self._check_embeds()
        with self._gradients():
            embedding, tokens = self.embedding_and_tokens(self.prepare(pixels))  # [B, E], [B, h*w, D]
            return F.normalize(embedding.float(), dim=-1), self._on_grid(tokens)

    def embed_text(self, texts: list[str]) -> Tensor:
        """T texts -> [T, E] float32 of unit norm. ValueError for an encoder without a text tower."""
        if not self.has_text:
            raise ValueError(f"{self.name} has no text tower; embed texts with a CLIP-like encoder such as clip-vit-l14")
        if isinstance(texts, str):
            raise ValueError(f"embed_text takes a list of texts, got the single text {texts!r}")
        with self._gradients():
            return F.normalize(self.text_embedding(list(texts)).float(), dim=-1)  # [T, E]

    def prepare(self, pixels: Tensor) -> Tensor:
        """Resize to S x S (aspect ratio not kept), scale, normalise with this encoder's own mean and std, cast.

        Args:
            pixels: [B, 3, H, W], uint8 or float in [0, 1].

        Returns:
            [B, 3, S, S] in the dtype and on the device of the tower.

        Raises:
            ValueError: for another rank, channel count or dtype; on the CPU also for floats outside [0, 1].
        """
        _check_pixels(pixels)
        parameter = next(self.tower.parameters())
        # A tower that is offloaded lies on the meta device between two calls, and comes to the pixels.
        x = pixels.to(pixels.device if parameter.is_meta else parameter.device).float()  # [B, 3, H, W]
        if pixels.dtype == torch.uint8:
            x = x / 255
        if x.shape[-2:] != (self.image_size, self.image_size):
            side = (self.image_size, self.image_size)
            mode = "bilinear" if self.preprocessing.interpolation == "bilinear" else "bicubic"  # torch has no other filter of Pillow
            x = F.interpolate(x, side, mode=mode, antialias=True).clamp(0, 1)  # [B, 3, S, S]
        # By channel: a mean tensor would have to be a buffer (cast to bf16 with the tower) or a copy in every call.
        channels = [(x[:, c] - self.mean[c]) / self.std[c] for c in range(3)]
        return torch.stack(channels, dim=1).to(parameter.dtype)  # [B, 3, S, S]

    def resize_to(self, grid: tuple[int, int]) -> None:
        """Choose the input size whose tokens lie on `grid`. ValueError when this encoder cannot reach it."""
        height, width = grid
        if (height, width) == self.grid:
            return
        have = f"{self.name} gives a {self.grid[0]}x{self.grid[1]} grid and cannot give {height}x{width}"
        if height != width:
            raise ValueError(f"{have}: encoders take square images, so grids are square")
        if not self.flexible or height < 1:
            raise ValueError(f"{have}: its input size is fixed at {self.image_size} pixels")
        self.set_image_size(height * self.patch_size)

    def set_image_size(self, image_size: int) -> None:
        """Take square inputs of `image_size` pixels from now on. Positions are interpolated as the backend does it.

        Where the backend keeps the positions of a single size as a parameter, that parameter is replaced.
        """
        if image_size == self.image_size:
            return
        if not self.flexible:
            raise ValueError(f"{self.name} takes {self.image_size} pixels only, not {image_size}")
        if image_size < self.patch_size or image_size % self.patch_size:
            near = max(1, round(image_size / self.patch_size)) * self.patch_size
            raise ValueError(f"image_size {image_size} is no multiple of the patch size {self.patch_size} of {self.name}; try {near}")
        self.change_input_size(image_size)
        self.preprocessing = replace(self.preprocessing, image_size=image_size)

    def train(self, mode: bool = True) -> Encoder:
        """A frozen encoder stays in eval mode, whatever its parent does."""
        return super().train(mode and not self.frozen)

    @abstractmethod
    def patch_tokens(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] normalised -> [B, h*w, D]: the outputs of `layers` side by side, normed if `norm`, without prefix tokens."""

    @abstractmethod
    def image_embedding(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] normalised -> [B, E] of any length. Never called when `embed_dim` is None."""

    def embedding_and_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] normalised -> `image_embedding(x)` and `patch_tokens(x)`. A backend that can do both in one pass overrides this."""
        return self.image_embedding(x), self.patch_tokens(x)

    def text_embedding(self, texts: list[str]) -> Tensor:
        """T texts -> [T, E] of any length. Only for encoders with `has_text`."""
        raise NotImplementedError

    def change_input_size(self, image_size: int) -> None:
        """Make the tower take `image_size` pixels, a multiple of the patch size. By default it takes any size as it is."""

    def _gradients(self) -> torch.set_grad_enabled:
        """Make sure that a frozen encoder records no gradient, whatever its caller does."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)

    def _on_grid(self, tokens: Tensor) -> PatchFeatures:
        """Check that the tokens [B, h*w, D] fill the grid."""
        expected = (self.grid[0] * self.grid[1], self.width)
        if tokens.shape[1:] != expected:
            raise ValueError(
                f"{self.name} gave {list(tokens.shape[1:])} tokens x channels for {self.image_size} pixels, expected {list(expected)}: "
                "its grid is not the input size divided by its stride; choose another size"
            )
        return PatchFeatures(tokens, self.grid)

    def _check_embeds(self) -> None:
        if self.embed_dim is None:
            raise ValueError(f"{self.name} has no embedding of a whole image; use its patch tokens")


def _by_layer(value: int | Mapping[int, int], depth: int) -> Mapping[int, int]:
    """Return the value of each layer that can be read."""
    return dict.fromkeys(range(depth + 1), value) if isinstance(value, int) else value


def _counted(layer: int | Sequence[int], depth: int, known: Mapping[int, int], norm: bool) -> tuple[int, ...]:
    """Return the chosen layers, counted from the front. ValueError if none is chosen, or a layer is not among `known`."""
    with_norm = " with norm=True" if norm else ""
    chosen = (layer,) if isinstance(layer, int) else tuple(layer)
    if not chosen:
        raise ValueError("an encoder needs a layer to read, got an empty list")
    counted = tuple(number if number >= 0 else depth + 1 + number for number in chosen)
    for number, count in zip(chosen, counted, strict=True):
        if count not in known:
            choice = ", ".join(f"{count} (or {count - depth - 1})" for count in sorted(known))
            raise ValueError(f"layer {number} does not exist{with_norm}: the tower has {depth} blocks; choose of {choice}")
    return counted


def _check_pixels(pixels: Tensor) -> None:
    """Refuse anything but a batch of plain RGB pixels."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
        raise ValueError(f"expected pixels of shape [B, 3, H, W], none of them 0, got {list(pixels.shape)}")
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise ValueError(f"expected uint8 pixels or floats in [0, 1], got {pixels.dtype}")
    # On a GPU the check would wait for all queued work.
    if pixels.is_floating_point() and pixels.device.type == "cpu":
        low, high = pixels.min().item(), pixels.max().item()
        if not (low >= -0.01 and high <= 1.01):  # nan fails too; interpolation may overshoot a little
            raise ValueError(
                f"float pixels must lie in [0, 1], got {low:.3g}..{high:.3g}; give them before normalisation "
                "(each encoder normalises for itself), or as uint8"
            )
