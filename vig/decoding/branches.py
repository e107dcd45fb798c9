"""A generation has two branches: the model with the images, and the same model with null inputs, which follows token by token."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

if TYPE_CHECKING:
    from vig.decoding.attention import EditedAttention
    from vig.decoding.method import Decoding

# Shapes: R rows of a batch (records times beams), P tokens of a prompt, N generated tokens, V the vocabulary.

READ, UNREAD = {"pooler_output", "deepstack_features"}, {"last_hidden_state", "hidden_states", "attentions"}
"""The image features that models read in generation (of all images, and of each layer), and the features that they do not read."""


class Branch:
    """A branch holds prompts [R, P], the model's other inputs and a cache, as transformers prepares them. They grow token by token."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, kwargs: dict[str, Any], config: GenerationConfig) -> None:
        self.model, self.ids, self.kwargs, self.config, self.begun = model, ids, kwargs, config, False

    def step(self, generated: Tensor) -> Any:
        """Return the model's output for the token that follows the prompt and the generated tokens [R, N]."""
        if self.begun:
            new = 1 if self.kwargs["use_cache"] else None
            ids = torch.cat([self.ids, generated], dim=1)  # [R, P + N]
            output = self.model(**self.model.prepare_inputs_for_generation(ids, next_sequence_length=new, **self.kwargs), return_dict=True)
        else:
            output = self.model._prefill(self.ids, self.config, self.kwargs)
        self.begun = True
        is_encoder_decoder = self.model.config.is_encoder_decoder
        self.kwargs = self.model._update_model_kwargs_for_generation(output, self.kwargs, is_encoder_decoder=is_encoder_decoder)
        return output

    @property
    def caches(self) -> dict[str, Cache]:
        """Return name -> cache; empty for a model without a cache."""
        return {name: value for name, value in self.kwargs.items() if isinstance(value, Cache)}

    def reorder(self, beams: Tensor) -> None:
        """Put the rows of the cache in the order of the beams [R]."""
        own = getattr(self.model, "_reorder_cache", None)  # transformers looks for it, too
        for name, cache in self.caches.items():
            if own is None:
                cache.reorder_cache(beams)
            else:
                self.kwargs[name] = own(cache, beams)


def null_branch(clean: Branch, inputs: Mapping[str, Any]) -> Branch:
    """Return the branch of the null inputs, which generates no more tokens than the branch with the images.

    Raises:
        ValueError: for null inputs that the model does not take, and when null inputs and inputs differ in their number of records.
    """
    if unknown := set(inputs) - set(inspect.signature(clean.model.forward).parameters):
        raise ValueError(
            f"{type(clean.model).__name__} does not take {', '.join(sorted(unknown))} of null_inputs: "
            "a model that hands its images to a language model of its own before it generates cannot contrast them"
        )
    config = copy.deepcopy(clean.config)
    config.update(max_new_tokens=clean.config.max_length - clean.ids.shape[1], max_length=None, min_length=0, stop_strings=None)
    config.update(output_attentions=False, output_hidden_states=False)
    ids, kwargs, config = clean.model.generate(**inputs, generation_config=config, custom_generate=_prepared)
    if len(ids) != len(clean.ids):
        raise ValueError(f"null_inputs have {len(ids)} rows (beams counted), but the inputs {len(clean.ids)}: give one per record")
    return Branch(clean.model, ids, kwargs, config)


def _prepared(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any) -> Any:
    """Return the inputs that `generate` has prepared, without generating anything."""
    return input_ids, kwargs, generation_config


def joined(clean: Branch, null: Branch) -> Branch | None:
    """Return a branch of 2R rows, first the rows with the images; None where the two branches cannot share a batch.

    They cannot share it in an encoder-decoder, with a cache that the caller gave, when attention or hidden states are asked for, or
    when the null inputs have other names or shapes, for example prompts of another length or without images.
    """
    given = any(getattr(cache, "_is_user_defined", False) or cache.get_seq_length() for cache in clean.caches.values())
    asked = clean.config.output_attentions or clean.config.output_hidden_states
    if given or asked or clean.model.config.is_encoder_decoder or clean.ids.shape != null.ids.shape:
        return None
    names = (clean.kwargs.keys() | null.kwargs.keys()) - clean.caches.keys()
    rows = {"position_ids": -2}  # [..., R, P] for models with places in the image
    try:
        kwargs = {name: _both(clean.kwargs.get(name), null.kwargs.get(name), rows.get(name, 0)) for name in names}
    except _ApartError:
        return None
    return Branch(clean.model, torch.cat([clean.ids, null.ids]), kwargs | clean.caches, clean.config)


class _ApartError(Exception):
    """_ApartError says that two inputs have no common batch."""


def _both(clean: Any, null: Any, rows: int = 0) -> Any:
    """Return an input of both branches as one batch. It is a tensor (with its rows in dimension `rows`), images, or image features."""
    if isinstance(clean, Tensor) and isinstance(null, Tensor):
        if clean.shape[rows + 1 :] == null.shape[rows + 1 :]:
            return torch.cat([clean, null], dim=rows)
    elif isinstance(clean, ModelOutput) and isinstance(null, ModelOutput) and clean.keys() | null.keys() <= READ | UNREAD:
        read = {"pooler_output": _both(clean.pooler_output, null.pooler_output)}
        if "deepstack_features" in clean:
            read["deepstack_features"] = list(map(_both, clean.deepstack_features, null.deepstack_features))
        return type(clean)(**{**clean, **read})
    elif type(clean) is type(null) is dict and clean.keys() == null.keys():
        return {name: _both(clean[name], null[name]) for name in clean}
    elif isinstance(clean, list | tuple) and isinstance(null, list | tuple) and all(isinstance(item, Tensor) for item in (*clean, *null)):
        return [*clean, *null]
    elif isinstance(clean, bool | int | float | str | None) and clean == null:
        return clean
    raise _ApartError


class Branches:
    """Branches replaces the model in transformers' loops of generation: each pass runs all branches and returns the logits to decode from.

    The branches are the branch with the images alone, or this branch and the null branch, or both joined in a batch. The model itself
    is not changed.
    """

    def __init__(self, method: Decoding, branches: Sequence[Branch], prompt: int, attention: EditedAttention | None) -> None:
        self._model, self._method, self._branches = branches[0].model, method, branches
        self._prompt, self._attention = prompt, attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        generated = input_ids[:, self._prompt :]  # [R, N]
        with nullcontext() if self._attention is None else self._attention.on(input_ids.shape[1]):
            output = self._branches[0].step(generated.repeat(len(self._branches[0].ids) // len(input_ids), 1))
        if self._method.contrasts:
            every = [output, *(branch.step(generated) for branch in self._branches[1:])]
            logits, null_logits = torch.cat([each.logits[:, -1].float() for each in every]).chunk(2)  # [R, V], [R, V]
            output.logits = self._method.combine(logits, null_logits, generated.shape[1] + 1).unsqueeze(1)  # [R, 1, V]
        return output

    def _prefill(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:
        return self(input_ids)

    def _valid_auto_compile_criteria(self, *_: Any) -> bool:
        return False  # a compiled model would bypass the branches

    def prepare_inputs_for_generation(self, input_ids: Tensor, *_: Any, **__: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}  # each branch prepares its own

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **_: Any) -> dict[str, Any]:
        return model_kwargs | self._branches[0].caches

    def _reorder_cache(self, cache: Any, beams: Tensor) -> Any:
        for branch in self._branches:
            branch.reorder(torch.cat([beams, beams + len(beams)]) if len(branch.ids) > len(beams) else beams)
        return next(iter(self._branches[0].caches.values()), cache)


@contextmanager
def kept_offsets(model: PreTrainedModel) -> Iterator[None]:
    """Restore the position offsets after the context. Models with positions in the image (Qwen-VL) remember them from the last prompt.

    The null branch's prompt may have another offset, which a conversation that goes on with its cache must not read.
    """
    kept = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        yield
    finally:
        for module, offsets in kept:
            module.rope_deltas = offsets
