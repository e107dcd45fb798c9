"""Two branches of one generation: the model with the images, and the same model with null inputs, which follows token by token."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

if TYPE_CHECKING:
    from vig.decoding.attention import EditedAttention
    from vig.decoding.method import Decoding

# Shapes: R rows of a batch (records times beams), P tokens of a prompt, N generated tokens, V the vocabulary.


class NullBranch:
    """The second branch, with a prompt and a cache of its own. transformers prepares both, so every model gets what it needs.

    Raises:
        ValueError: for null inputs that the model does not take, and when null inputs and inputs differ in their number of records.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], generation_config: GenerationConfig, input_ids: Tensor) -> None:
        if unknown := set(inputs) - set(inspect.signature(model.forward).parameters):
            raise ValueError(
                f"{type(model).__name__} does not take {', '.join(sorted(unknown))} of null_inputs: "
                "a model that hands its images to a language model of its own before it generates cannot contrast them"
            )
        own = copy.deepcopy(generation_config)
        own.update(max_new_tokens=generation_config.max_length - input_ids.shape[1], max_length=None, min_length=0, stop_strings=None)
        own.update(output_attentions=False, output_hidden_states=False)
        self.ids, self.kwargs, self.config = model.generate(**inputs, generation_config=own, custom_generate=_prepared)  # ids [R, P]
        if len(self.ids) != len(input_ids):
            raise ValueError(f"null_inputs have {len(self.ids)} rows (beams counted), but the inputs {len(input_ids)}: give one per record")
        self.model, self.begun = model, False

    def logits(self, generated: Tensor) -> Tensor:
        """Return the logits [R, V] behind the prompt and the generated tokens [R, N]."""
        if self.begun:
            ids = torch.cat([self.ids, generated], dim=1)  # [R, P + N]
            new = 1 if self.kwargs["use_cache"] else None
            inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=new, **self.kwargs)
            output = self.model(**inputs, return_dict=True)
        else:
            output = self.model._prefill(self.ids, self.config, self.kwargs)
        self.begun = True
        is_encoder_decoder = self.model.config.is_encoder_decoder
        self.kwargs = self.model._update_model_kwargs_for_generation(output, self.kwargs, is_encoder_decoder=is_encoder_decoder)
        return output.logits[:, -1]

    def reorder(self, beams: Tensor) -> None:
        """Let the cache follow the beams [R]."""
        for name, value in self.kwargs.items():
            if isinstance(value, Cache):
                self.kwargs[name] = reordered(self.model, value, beams)


def _prepared(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> tuple[Tensor, dict[str, Any], GenerationConfig]:
    """Return what `generate` has prepared, in place of generating."""
    return input_ids, model_kwargs, generation_config


def reordered(model: PreTrainedModel, cache: Any, beams: Tensor) -> Any:
    own = getattr(model, "_reorder_cache", None)  # transformers asks likewise
    if own is not None:
        return own(cache, beams)
    cache.reorder_cache(beams)
    return cache


class Branches:
    """Stands in for the model in transformers' loops of generation: each pass runs both branches and gives the combined logits.

    The model itself is not changed.
    """

    def __init__(
        self, model: PreTrainedModel, method: Decoding, prompt: int, null: NullBranch | None, attention: EditedAttention | None
    ) -> None:
        self._model, self._method, self._prompt, self._null, self._attention = model, method, prompt, null, attention
        self._ids = torch.empty(0)  # [R, P + N]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._model)._prefill(self, *args, **kwargs)

    def _valid_auto_compile_criteria(self, *args: Any) -> bool:
        return False  # a compiled model would bypass the second branch

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._ids = input_ids
        return self._model.prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _reorder_cache(self, cache: Any, beams: Tensor) -> Any:
        if self._null is not None:
            self._null.reorder(beams)
        return reordered(self._model, cache, beams)

    def __call__(self, **inputs: Any) -> Any:
        length = self._ids.shape[1]
        with nullcontext() if self._attention is None else self._attention.on(length):
            output = self._model(**inputs)
        if self._null is not None:
            null_logits = self._null.logits(self._ids[:, self._prompt :])
            logits = output.logits[:, -1].float()  # [R, V]
            step = length - self._prompt + 1
            output.logits = self._method.combine(logits, null_logits.to(logits), step).unsqueeze(1)  # [R, 1, V]
        return output


@contextmanager
def kept_offsets(model: PreTrainedModel) -> Iterator[None]:
    """Give back the offsets of positions that models with places in the image (Qwen-VL) remember of their last prompt.

    The null branch's prompt may have another offset, which a conversation that goes on with its cache must not read.
    """
    kept = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        yield
    finally:
        for module, offsets in kept:
            module.rope_deltas = offsets
