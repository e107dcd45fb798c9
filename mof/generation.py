"""ImageGenerationMixin lets a model generate with images. They enter with the prompt only, and follow their records.

So they are repeated with their records for beams, and left out if a cache holds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

# Shapes: R records, L tokens per record, M images of all records in order, T tokens per image, D the width of the language model.

IMAGE_INPUTS = ("pixel_values", "encoder_features", "image_features")  # a call gives at most one of these inputs
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # since transformers 5.24; before 5.24; Mamba's before 5.24


class ImageGenerationMixin(GenerationMixin):
    """ImageGenerationMixin is the part of `MoFForConditionalGeneration` that prepares the steps of `generate`."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Write tokens as in transformers. A cache may be given under its name before transformers 5.24, and under its name since."""
        for name in CACHE_NAMES:
            if name in kwargs and self.cache_name and not self._recurrent:  # transformers must not see a recurrent state
                kwargs[self.cache_name] = kwargs.pop(name)
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare a step of generation. Images enter together with their tokens, and not again when the cache holds these tokens.

        Raises:
            ValueError: for a language model whose cache has another name (RWKV), unless `use_cache=False`.
        """
        use_cache = kwargs.get("use_cache", True)
        if not self.cache_name and use_cache:
            name = type(self.language_model).__name__
            raise ValueError(f"{name} takes no cache named {', '.join(CACHE_NAMES)}; generate with use_cache=False")
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if kwargs.get(name) is not None}
        # transformers must not see a recurrent state, because it would make attention masks for the state.
        state = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs} if self._recurrent else {}
        embeds = {} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, is_first_iteration=is_first_iteration, **embeds, **kwargs
        )
        inputs |= state
        if not images or not use_cache:
            return inputs | images
        if is_first_iteration:
            return inputs | self._unseen_images(images, input_ids, inputs_embeds, inputs)
        # A model writes no images. The first step of an assistant model counts as a later step, but has the whole prompt.
        whole = inputs_embeds is None and inputs["input_ids"].shape[1] == input_ids.shape[1]
        return inputs | images if whole else inputs

    def _unseen_images(
        self, images: dict[str, Tensor], input_ids: Tensor, inputs_embeds: Tensor | None, inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the last images of each record, which belong to `inputs`. A cache already holds the beginning of the prompt."""
        prompt = self._count_images(input_ids, inputs_embeds, images)  # images of each record
        left = self._count_images(inputs["input_ids"], inputs.get("inputs_embeds"), images)
        if prompt == left or sum(prompt) != sum(map(len, images.values())):
            return images  # the whole prompt is new, or the user gave the new images only; for other counts forward raises an error
        last: dict[str, Tensor] = {}
        for name, value in images.items():
            chunks = [chunk[len(chunk) - new :] for chunk, new in zip(value.split(prompt), left, strict=True)]
            last[name] = torch.cat(chunks)  # [M, ...]
        return last if sum(left) else {}

    def _count_images(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, images: dict[str, Tensor]) -> list[int]:
        """Return the number of images in each record of inputs_embeds [R, L, D], or of input_ids [R, L] without inputs_embeds."""
        slots = self._find_image_tokens(input_ids if inputs_embeds is None else None, inputs_embeds)  # [R, L]
        return (slots.sum(dim=1) // self._tokens_of_each(images)).tolist()

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Make the cache, except for language models that make it themselves: recurrent models, and models that transformers lists."""
        if not self._recurrent and self.language_model._supports_default_dynamic_cache():
            super()._prepare_cache_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat the inputs for beams or samples. The images of all records are in a flat list, so they are repeated record by record."""
        images = {key: kwargs.pop(key) for key in IMAGE_INPUTS if kwargs.get(key) is not None}
        if images and expand_size > 1:
            embeds = kwargs.get("inputs_embeds")
            self._check_counts(self._find_image_tokens(input_ids if embeds is None else None, embeds), images)
            counts = self._count_images(input_ids, embeds, images)
            for key, value in images.items():
                by_record = value.split(counts)  # R of [M_r, ...]
                images[key] = torch.cat([chunk for chunk in by_record for _ in range(expand_size)])  # [M * expand_size, ...]
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | images
