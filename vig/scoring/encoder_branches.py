"""EncoderBranches makes the passes in which a single encoder of a mixture sees the null images, and the others see the images.

Each image and each null image goes through each encoder once. The passes differ only in the features that the mixture fuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mof.data.answer_tokens import Example
from vig.scoring.batches import Batch

# Shapes: M = images of a record, X = images of several records, P = positions of an image, C = width of an encoder,
# T = tokens of an image, D = width of the language model.

PIXELS, STORED, FUSED = "pixel_values", "encoder_features", "image_features"
"""The inputs of a mixture: pixels, features out of a store, or the features [M, T, D] that its mixer has fused."""
Features = Mapping[str, Tensor]  # encoder -> [M, P, C]


def mixture_of(model: PreTrainedModel) -> Any:
    """Return the mixer of a model (`mof.mixer.Mixer`). ValueError for a model that has none."""
    mixer = getattr(model, "mixer", None)
    if mixer is None:
        raise ValueError(f"per_encoder is for a mixture of encoders (MoFForConditionalGeneration); {type(model).__name__} is none")
    return mixer


class EncoderBranches:
    """EncoderBranches fuses the features of images and null images for each pass of a batch.

    Args:
        model: a model with a mixer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._mixer = model, mixture_of(model)
        self.names = list(self._mixer.encoders)
        """The encoders, in the order of their passes."""
        self._known: dict[str, tuple[Features, Features]] = {}
        """Digest of a record's images -> features of its images and of its null images. The next batch may have images of the last."""

    @torch.inference_mode()
    def passes(self, batch: Batch) -> list[list[list[Example]]]:
        """Return the groups of examples of each pass: with the images, with the null images, then with null images for each encoder."""
        self._known = self._features(batch)
        return [self._groups(batch, blind) for blind in ([], self.names, *([name] for name in self.names))]

    def _groups(self, batch: Batch, blind: list[str]) -> list[list[Example]]:
        """Return the groups of examples of the pass in which the encoders `blind` see the null images."""
        fused = {}
        for images, (clean, null) in self._known.items():
            fused[images] = self._mixer.fuse({name: (null if name in blind else clean)[name] for name in clean})  # [M, T, D]
        return [[_showing(pair.clean, fused[pair.images]) for pair in group] for group in batch.groups]

    def _features(self, batch: Batch) -> dict[str, tuple[Features, Features]]:
        """Return digest -> features for the images of a batch. All images that are not known go through the encoders together."""
        pairs = {pair.images: pair for pair in batch.pairs}
        known = {images: self._known[images] for images in pairs if images in self._known}
        new = [pair for images, pair in pairs.items() if images not in known]
        clean, null = self._encode([pair.clean for pair in new]), self._encode([pair.null for pair in new])
        return known | {pair.images: both for pair, both in zip(new, zip(clean, null, strict=True), strict=True)}

    def _encode(self, examples: list[Example]) -> list[Features]:
        """Return the features of the images of each example."""
        if not examples:
            return []
        stored = STORED in examples[0].images
        inputs = [example.images[STORED if stored else PIXELS] for example in examples]
        joined = torch.cat(inputs).to(self._model.device)
        features = self._mixer.unpack(joined.to(self._model.dtype)) if stored else self._mixer.encode(joined)  # encoder -> [X, P, C]
        parts = {name: tokens.split([len(value) for value in inputs]) for name, tokens in features.items()}
        return [{name: split[place] for name, split in parts.items()} for place in range(len(examples))]


def _showing(example: Example, fused: Tensor) -> Example:
    """Return the example with image features in place of its pixels."""
    others = {name: value for name, value in example.images.items() if name not in (PIXELS, STORED)}
    return replace(example, images={**others, FUSED: fused})
