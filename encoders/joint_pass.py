"""Patch tokens and the embedding of an image from one pass through the tower, where the tower allows it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from encoders.base import Encoder

# Shapes: B = images, H, W = their rows and columns, E = width of an embedding, T = h*w patch
# tokens, P = prefix tokens, D = their width.


class JointPass:
    """An encoder that gives embeddings and patch tokens at once: the pass for the one goes by the layer of the other.

    Which module gives the tokens is found on the first batch, for which both passes are made: its output ends, in both, in the very
    tokens that the encoder gives. Where there is none, as in convolutional networks and for several layers side by side, it
    stays at two passes. Threads may share one.

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
            if not self._tried:
                return self._try(pixels)
        if self.module is None:
            return self.encoder.embed_image(pixels), self.encoder(pixels).tokens
        embeddings = self.encoder.embed_image(pixels)  # [B, E]
        output = self._here.__dict__.pop("output")  # [B, P + T, D]
        return embeddings, output[:, -self.encoder.grid[0] * self.encoder.grid[1] :]  # [B, T, D]

    def close(self) -> None:
        """Leave the encoder as it was."""
        if self._hook is not None:
            self._hook.remove()

    def _try(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with _watched(self.encoder.tower.modules(), lambda output: output[:1].clone()) as outputs:  # all of them would fill the memory
            tokens = self.encoder(pixels).tokens  # [B, T, D]
        holders = [module for module, output in outputs.items() if _ends_in(output, tokens[:1])]
        with _watched(holders, lambda output: output) as outputs:
            embeddings = self.encoder.embed_image(pixels)  # [B, E]
        self.module = next((module for module, output in outputs.items() if _ends_in(output, tokens)), None)
        self._hook = None if self.module is None else self.module.register_forward_hook(self._keep)
        self._tried = True
        return embeddings, tokens

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._here.output = _tensor(output)


@contextmanager
def _watched(modules: Iterable[nn.Module], part: Callable[[Tensor], Tensor]) -> Iterator[dict[nn.Module, Tensor]]:
    """A part of the last output of each module that runs meanwhile and gives a sequence of tokens."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        output = _tensor(output)
        if isinstance(output, Tensor) and output.ndim == 3:
            outputs[module] = part(output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _tensor(output: Any) -> Any:
    """Blocks of some versions of transformers give their output in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _ends_in(output: Tensor, tokens: Tensor) -> bool:
    return output.shape[1] >= tokens.shape[1] and torch.equal(output[:, -tokens.shape[1] :], tokens)
