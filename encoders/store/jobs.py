"""A job is an encoder of a run. It takes images and encodes them in batches, two batches at a time."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.base import Encoder
from encoders.store.files import pack
from encoders.store.shards import ShardWriter

# Shapes: B = images of a batch, S = side of an encoder's input, E = width of an embedding, T = patch tokens, D = width of a patch token.

LANES = 2
"""Number of batches that are encoded at the same time, so that a batch computes while another waits. Each batch takes memory."""


class Job:
    """A job is an encoder of a run. It takes images, encodes batches, and adds the rows to its shards.

    Args:
        name: the encoder's name in the store.
        encoder: the encoder; if device, dtype or mode must change, a copy is used, because casting back would not restore the weights.
        entry: the encoder's entry in the manifest.
        run: the run that the encoder's shards name (`encoders.store.manifest.run_of`).
        store: the store's folder.
        pool: `LANES` threads, each of which encodes a batch.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        entry: Mapping[str, Any],
        run: str,
        store: Path,
        pool: ThreadPoolExecutor,
        *,
        batch_size: int,
        device: str | torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.name, self.batch_size = name, batch_size
        self.encoder = _placed(encoder, device, dtype)
        self.embeddings, self.tokens = entry["embeddings"], entry["tokens"]
        self.writer = ShardWriter(store / entry["folder"], run, name)
        self._pool = pool
        self._keys: list[str] = []
        self._pixels: list[Tensor] = []  # images [3, S, S] uint8
        self._running: deque[tuple[list[str], Future[dict[str, Tensor]]]] = deque()

    def take(self, key: str, pixels: Tensor) -> None:
        """Collect an image [3, S, S]. A full batch is sent to a thread."""
        self.writer.claimed.add(key)
        self._keys.append(key)
        self._pixels.append(pixels)
        if len(self._keys) == self.batch_size:
            self._send()

    def collect(self, wait: bool = False) -> Iterator[dict[str, str]]:
        """Hand finished batches to the writer in order. With `wait`, all batches are finished, also the last, smaller batch.

        Yield after each batch key -> reason for its images whose features are not finite. These features are not stored.
        """
        if wait and self._keys:
            self._send()
        most = 0 if wait else 2 * LANES  # as many batches wait as run; more batches would only take memory
        while self._running and (len(self._running) > most or self._running[0][1].done()):
            keys, running = self._running.popleft()
            features = running.result()
            finite = features.pop("finite").tolist()  # [B]
            refused = [key for key, good in zip(keys, finite, strict=True) if not good]
            if refused:
                keys = [key for key, good in zip(keys, finite, strict=True) if good]
                features = {kind: values[torch.tensor(finite)] for kind, values in features.items()}
            if keys:
                self.writer.add(keys, features)
            hint = "; values above 65504 do not fit float16: store them as bfloat16 or int8" if self.tokens == "float16" else ""
            yield dict.fromkeys(refused, f"{self.name} gives features that are not finite{hint}")

    def _send(self) -> None:
        self._running.append((self._keys, self._pool.submit(self._encode, self._pixels)))
        self._keys, self._pixels = [], []

    @torch.inference_mode()
    def _encode(self, images: list[Tensor]) -> dict[str, Tensor]:
        """Return kind -> features of B images [3, S, S], in the CPU's memory."""
        device = next(self.encoder.tower.parameters()).device
        pixels = torch.stack(images)  # [B, 3, S, S]
        if device.type == "cuda":
            pixels = pixels.pin_memory().to(device, non_blocking=True)
        features: dict[str, Tensor] = {}
        if self.embeddings and self.tokens is not None:
            features["embeddings"], patches = self.encoder.embed_with_tokens(pixels)  # [B, E], [B, T, D]
            features |= pack(patches.tokens, self.tokens)
        elif self.embeddings:
            features["embeddings"] = self.encoder.embed_image(pixels)  # [B, E]
        else:
            features |= pack(self.encoder(pixels).tokens, self.tokens)  # [B, T, D]
        floats = [values for values in features.values() if values.is_floating_point()]
        features["finite"] = torch.stack([values.flatten(1).isfinite().all(1) for values in floats]).all(0)  # [B]
        return {kind: value.cpu() for kind, value in features.items()}  # only this lane waits for a GPU here


def _placed(encoder: Encoder, device: str | torch.device | None, dtype: torch.dtype | None) -> Encoder:
    parameter = next(encoder.tower.parameters())
    device, dtype = torch.device(device or parameter.device), dtype or parameter.dtype
    if (parameter.device, parameter.dtype, encoder.training) == (device, dtype, False):
        return encoder
    return copy.deepcopy(encoder).eval().to(device, dtype)
