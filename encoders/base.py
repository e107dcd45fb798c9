"""Encoder is the contract that every encoder keeps, whatever library its weights come from."""

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
# columns of the encoder's patch grid, D = width (of all chosen layers together), T = texts, E = width of the joint embedding.


MOST_LOST = 4  # rows of tokens that a network may lose at the border of an image


class PatchFeatures(NamedTuple):
    """PatchFeatures holds patch tokens in row-major order, and their grid."""

    tokens: Tensor  # [B, h*w, D]
    grid: tuple[int, int]  # (h, w)


class Encoder(nn.Module, ABC):
    """An encoder is a vision network that takes plain pixels and returns the patch tokens of a layer, or of several layers joined.

    Resizing, normalisation, class and register tokens, the choice of the layer and position interpolation happen here and
    nowhere else. A subclass hands its backend's model to `__init__` and implements `patch_tokens` and `image_embedding`, and, if
    its models can do this, `text_embedding` and `change_input_size`.

    Attributes:
        name: the name that `build_encoder` was given.
        weights, config: the weight file and the values for the config that `build_encoder` was given; None without them.
        tower: the backend's own model, with its text tower if it has one.
        width, patch_size: D, and the side of a patch in pixels.
        preprocessing: the steps of the backend's own processor, with `image_size`, `mean` and `std`.
        prefix_tokens: class and register tokens, which come before the patch tokens in the tower and are cut off.
        embed_dim: E, or None when the model has no embedding of a whole image.
        layer: the layer whose output `forward` returns: -1 is the last block, -2 the block before it, k >= 1 the k-th block,
            0 the embeddings. The default is -2 for a transformer with a text tower, else -1. The channels of several layers
            stand side by side, in the order of `layer`. A "block" of a convolutional network is a stage.
        norm: whether the tower's final norm is applied to this output. By default it is not.
        layers: `layer` counted from the front: the number of blocks that run before each layer is read.
        layer_widths: the number of channels of each layer; the sum is D.
        blocks: the number of blocks that `forward` runs, the largest of `layers`.
        flexible: whether other input sizes are possible.
        has_text: whether there is a text tower.
        frozen: whether the encoder has no gradient and stays in eval mode. By default it does.
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
            width, patch_size: a number for all layers, or layer (counted from the front) -> number if layers differ.
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
        self.name = type(self).__name__  # build_encoder replaces name, weights and config
        self.weights: str | None = None
        self.config: dict[str, Any] | None = None
        self.layer_widths = tuple(widths[number] for number in self.layers)
        self.width, self.patch_size = sum(self.layer_widths), strides[self.layers[0]]
        self.embed_dim = embed_dim
        self.preprocessing = Preprocessing(**preprocessing)
        self.declared_statistics = self.mean, self.std  # `spec` holds mean and std only if they differ from these
        self.layer = layer if isinstance(layer, int) else list(layer)
        self.norm, self.blocks = bool(norm), max(self.layers)
        self.frozen = not trainable
        self.tower = tower.requires_grad_(trainable)
        self.eval()
        self._grid = self.measure_grid()

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

    def _repr_html_(self) -> str:
        from encoders.pages.notebook import notebook_table, shortened  # only notebooks need it

        lines = [line.strip() for line in repr(self).splitlines()[-3:]]  # a name may have several lines
        rows = zip(("tokens", "read", "weights"), lines, strict=True)
        return notebook_table(f"{type(self).__name__} {shortened(self.name)}", rows)

    @property
    def image_size(self) -> int:
        """Return S, the side of the encoder's square input in pixels."""
        return self.preprocessing.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Return the mean per channel that is subtracted from pixels in [0, 1]."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Return the standard deviation per channel by which pixels are divided."""
        return self.preprocessing.std

    @property
    def grid(self) -> tuple[int, int]:
        """Return (h, w), the grid of the tokens that `forward` returns."""
        return self._grid

    @property
    def spec(self) -> dict[str, Any]:
        """Return JSON-able arguments. `build_encoder(**spec)` builds this encoder again, except for weights that were trained since."""
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
        """Return a file or an image as [3, S, S] uint8, cropped and resized as by the backend's own processor.

        Raises:
            ImageError: for a file that cannot be read; the message names it.
        """
        return self.preprocessing.pixels(read_image(image))  # [3, S, S]

    def forward(self, pixels: Tensor) -> PatchFeatures:
        """Return the patch tokens: pixels [B, 3, H, W], uint8 or float in [0, 1] -> tokens [B, h*w, D]. No block after `layer` runs."""
        with self._gradients():
            return self._on_grid(self.patch_tokens(self.prepare(pixels)))  # [B, h*w, D]

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of images: pixels [B, 3, H, W] as for `forward` -> [B, E] float32 of unit norm.

        The whole tower runs. The embedding of a CLIP-like model is projected, to be compared with texts. The embedding of DINOv2 is
        the normalised class token.
        """
        self._check_embeds()
        with self._gradients():
            return F.normalize(self.image_embedding(self.prepare(pixels)).float(), dim=-1)  # [B, E]

    def embed_with_tokens(self, pixels: Tensor) -> tuple[Tensor, PatchFeatures]:
        """Return `embed_image(pixels)` and `self(pixels)`, from a single pass through the tower if the backend can do this."""
        self._check_embeds()
        with self._gradients():
            embedding, tokens = self.embedding_and_tokens(self.prepare(pixels))  # [B, E], [B, h*w, D]
            return F.normalize(embedding.float(), dim=-1), self._on_grid(tokens)

    def embed_text(self, texts: list[str]) -> Tensor:
        """Return the embeddings of texts: T texts -> [T, E] float32 of unit norm.

        Raises:
            ValueError: for an encoder without a text tower.
        """
        if not self.has_text:
            raise ValueError(f"{self.name} has no text tower; embed texts with a CLIP-like encoder such as clip-vit-l14")
        if isinstance(texts, str):
            raise ValueError(f"embed_text takes a list of texts, got the single text {texts!r}")
        with self._gradients():
            return F.normalize(self.text_embedding(list(texts)).float(), dim=-1)  # [T, E]

    def prepare(self, pixels: Tensor) -> Tensor:
        """Resize pixels to S x S (the aspect ratio may change), normalise them with this encoder's mean and std, and cast them.

        Args:
            pixels: [B, 3, H, W], uint8 or float in [0, 1].

        Returns:
            [B, 3, S, S] in the dtype and on the device of the tower.

        Raises:
            ValueError: for another rank, number of channels or dtype; on the CPU also for floats outside [0, 1].
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
        # By channel, because a mean tensor would be a buffer (cast to bf16 with the tower) or a copy in every call.
        channels = [(x[:, c] - self.mean[c]) / self.std[c] for c in range(3)]
        return torch.stack(channels, dim=1).to(parameter.dtype)  # [B, 3, S, S]

    def resize_to(self, grid: tuple[int, int]) -> None:
        """Choose the input size whose tokens lie on `grid`.

        Raises:
            ValueError: for a grid that this encoder cannot give.
        """
        height, width = grid
        if (height, width) == self.grid:
            return
        have = f"{self.name} gives a {self.grid[0]}x{self.grid[1]} grid and cannot give {height}x{width}"
        if height != width:
            raise ValueError(f"{have}: encoders take square images, so grids are square")
        if not self.flexible or height < 1:
            raise ValueError(f"{have}: its input size is fixed at {self.image_size} pixels")
        before = self.image_size
        for side in range(height, height + MOST_LOST + 1):
            self.set_image_size(side * self.patch_size)
            if self.grid == (height, width):
                return
        tried = self.image_size
        self.set_image_size(before)
        raise ValueError(f"{have}: no size up to {tried} pixels does")

    def set_image_size(self, image_size: int) -> None:
        """Take square inputs of `image_size` pixels from now on. Positions are interpolated in the way of the backend.

        If the backend keeps the positions of a single size as a parameter, this parameter is replaced.
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
        self._grid = self.measure_grid()

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode. A frozen encoder stays in eval mode, whatever its parent does."""
        return super().train(mode and not self.frozen)

    @abstractmethod
    def patch_tokens(self, x: Tensor) -> Tensor:
        """Return the outputs of `layers` side by side, without prefix tokens: [B, 3, S, S] normalised -> [B, h*w, D], normed if `norm`."""

    @abstractmethod
    def image_embedding(self, x: Tensor) -> Tensor:
        """Return embeddings of any length: [B, 3, S, S] normalised -> [B, E]. Never called when `embed_dim` is None."""

    def embedding_and_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `image_embedding(x)` and `patch_tokens(x)` for normalised x [B, 3, S, S].

        A backend that can compute both in a single pass overrides this.
        """
        return self.image_embedding(x), self.patch_tokens(x)

    def text_embedding(self, texts: list[str]) -> Tensor:
        """Return embeddings of any length: T texts -> [T, E]. Only encoders with `has_text` implement this."""
        raise NotImplementedError

    def change_input_size(self, image_size: int) -> None:
        """Make the tower take `image_size` pixels, a multiple of the patch size. By default nothing has to be changed for this."""

    def measure_grid(self) -> tuple[int, int]:
        """Return (h, w) of the tokens at the present input size. A backend overrides this if its networks lose border pixels."""
        return (self.image_size // self.patch_size,) * 2

    def _gradients(self) -> torch.set_grad_enabled:
        """Return a context in which a frozen encoder records no gradient, whatever its caller does."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)

    def _on_grid(self, tokens: Tensor) -> PatchFeatures:
        """Check that the tokens [B, h*w, D] fill the grid."""
        expected = (self.grid[0] * self.grid[1], self.width)
        if tokens.shape[1:] != expected:
            raise ValueError(
                f"{self.name} gave {list(tokens.shape[1:])} tokens x channels for {self.image_size} pixels, expected {list(expected)}: "
                "its grid is not the input size divided by its stride, so its class must override measure_grid"
            )
        return PatchFeatures(tokens, self.grid)

    def _check_embeds(self) -> None:
        if self.embed_dim is None:
            raise ValueError(f"{self.name} has no embedding of a whole image; use its patch tokens")


def _by_layer(value: int | Mapping[int, int], depth: int) -> Mapping[int, int]:
    """Return the value of each layer that can be read."""
    return dict.fromkeys(range(depth + 1), value) if isinstance(value, int) else value


def _counted(layer: int | Sequence[int], depth: int, known: Mapping[int, int], norm: bool) -> tuple[int, ...]:
    """Return the chosen layers, counted from the front.

    Raises:
        ValueError: if no layer is chosen, or a layer is not among `known`.
    """
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
    """Raise a ValueError for anything other than a batch of plain RGB pixels."""
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
