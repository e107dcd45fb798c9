"""Patch tokens and the embedding of an image from one pass through the tower, where the tower allows it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from encoders.base import Encoder

# Shapes: B = images, H, W = their rows and columns, E = width of an embedding, T = h*w patch tokens, P = prefix tokens, D = width.

ROUNDING = 0.05
"""A batch is not computed to the bit as its first image alone; bfloat16 adds up to a few percent. Other layers differ far more."""


class JointPass:
    """An encoder that gives embeddings and patch tokens at once: the pass for the one goes by the layer of the other.

    Which module gives the tokens is found on the first image: its output ends, in a pass for the tokens alone, in the very tokens
    that the encoder gives, and in the pass for the embedding too, up to rounding. Where there is none, as in convolutional networks
    and for several layers side by side, two passes are made. Threads may share one.

    Attributes:
        module: the one that was found, or None.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.module: nn.Module | None = None
        self._hook: RemovableHandle | None = None
        self._tried, self._first = False, threading.Lock()
        self._here = threading.local()  # several batches may be on their way

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, H, W] as for the encoder -> embeddings [B, E] and patch tokens [B, T, D]."""
        with self._first:
            embeddings = None if self._tried else self._find(pixels)
        if embeddings is None:
            embeddings = self.encoder.embed_image(pixels)  # [B, E]
        if self.module is None:
            return embeddings, self.encoder(pixels).tokens
        output = self._here.__dict__.pop("output")  # [B, P + T, D]
        return embeddings, output[:, -self.encoder.grid[0] * self.encoder.grid[1] :]  # [B, T, D]

    def close(self) -> None:
        """Leave the encoder as it was."""
        if self._hook is not None:
            self._hook.remove()

    def _find(self, pixels: Tensor) -> Tensor:
        """Look for the module, and embed the first batch meanwhile: [B, E]."""
        with _watched(self.encoder.tower.modules()) as outputs:
            tokens = self.encoder(pixels[:1]).tokens  # [1, T, D]
        exact = [module for module, output in outputs.items() if _distance(output, tokens) == 0]
        with _watched(exact) as outputs:
            embeddings = self.encoder.embed_image(pixels)  # [B, E]
        found = ((module, output) for module, output in outputs.items() if _distance(output, tokens) < ROUNDING)
        self.module, self._here.output = next(found, (None, None))
        self._hook = None if self.module is None else self.module.register_forward_hook(self._keep)
        self._tried = True
        return embeddings

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._here.output = _tensor(output)


@contextmanager
def _watched(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """The last output of each module that runs meanwhile and gives a sequence of tokens."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        output = _tensor(output)
        if isinstance(output, Tensor) and output.ndim == 3:
            outputs[module] = output

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _tensor(output: Any) -> Any:
    """Blocks of some versions of transformers give their output in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _distance(output: Tensor, tokens: Tensor) -> float:
    """How far the end of the first of `output` [B, P + T, D] is from tokens [1, T, D], relative to them."""
    end = output[:1, -tokens.shape[1] :]
    return float((end - tokens).float().norm() / tokens.float().norm()) if end.shape == tokens.shape else float("inf")
