"""The similarities of a sample of all pairs of a collection serve for a histogram, and for advice on thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mof.pairs.embedding_rows import EmbeddingRows

# Shapes: N = images, S = images of the sample, M = pairs.

SAMPLE = 1024
"""S at most: half a million pairs."""
CLOSEST, FARTHEST = 0.01, 0.1
"""Shares that advised thresholds single out at most: of all pairs by CLIP, and of these pairs by DINOv2."""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds holds two thresholds, and an estimate of the number of pairs that they select."""

    clip_above: float
    dino_below: float
    pairs: int


@dataclass(frozen=True)
class SimilaritySample:
    """SimilaritySample holds both similarities of M pairs."""

    clip: NDArray[np.float32]
    """[M], cosine; with several encoders, the least"""
    dino: NDArray[np.float32]
    """[M], cosine; with several encoders, the largest"""
    pairs: int
    """Number of pairs in the collection."""

    def advice(self, clip_above: float, dino_below: float) -> Thresholds | None:
        """Return thresholds that find pairs, as near to the given thresholds as the sample allows. None for less than two images.

        CLIP's is lowered until one pair in a hundred is above it, DINOv2's is raised until a tenth of these pairs is below it.
        """
        if not len(self.clip):
            return None
        above = min(clip_above, math.floor(1000 * np.quantile(self.clip, 1 - CLOSEST) - 1e-6) / 1000)
        close = self.dino[self.clip > above]  # [close pairs]
        below = max(dino_below, math.ceil(1000 * np.quantile(close, FARTHEST) + 1e-6) / 1000)
        return Thresholds(above, below, round(int((close < below).sum()) / len(self.clip) * self.pairs))

    def quantiles(self) -> str:
        """Return two lines: the highest similarities of CLIP, and the lowest of DINOv2."""
        high, low = np.quantile(self.clip, [0.5, 0.9, 0.99, 0.999, 1]), np.quantile(self.dino, [0.5, 0.1, 0.01, 0.001, 0])
        shares = ("half of the pairs", "10 %", "1 %", "0.1 %")
        lines = []
        for name, side, values, last in (("CLIP", "above", high, "the highest"), ("DINO", "below", low, "the lowest")):
            parts = [f"{share} {side} {value:.3f}" for share, value in zip(shares, values, strict=False)]
            lines.append(f"{name} similarity: {', '.join(parts)}, {last} {values[-1]:.3f}")
        return "\n".join(lines)


def sample_similarities(clips: Sequence[Any], dinos: Sequence[Any]) -> SimilaritySample:
    """Return the similarities of all pairs of a random sample of images, always the same sample. A small collection is taken whole.

    Args:
        clips, dinos: embeddings [N, any width] of each encoder, as `blind_pairs` takes them.
    """
    rows = [[EmbeddingRows(embeddings, "embeddings") for embeddings in side] for side in (clips, dinos)]
    count = len(rows[0][0])
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:SAMPLE])  # [S]
    i, j = np.triu_indices(len(chosen), 1)  # [M], [M]

    def similarities(encoder: EmbeddingRows) -> Tensor:
        sample = encoder.take(torch.from_numpy(chosen))  # [S, E]
        return (sample @ sample.T)[i, j]  # [M]

    clip = torch.stack([similarities(encoder) for encoder in rows[0]]).amin(0).numpy()  # [M]
    dino = torch.stack([similarities(encoder) for encoder in rows[1]]).amax(0).numpy()  # [M]
    return SimilaritySample(clip, dino, count * (count - 1) // 2)
