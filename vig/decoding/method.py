"""A decoding method is a formula of two logits, an edit of attention, or both. `model.generate(custom_generate=method)` uses it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GENERATION_MODES_MAPPING

from vig.decoding.branches import Branch, Branches, joined, kept_offsets, null_branch
from vig.decoding.null_chats import Chat, has_image

if TYPE_CHECKING:
    from vig.decoding.attention import EditedAttention

# Shapes: R rows of a batch (records times beams), P tokens of a prompt, V the vocabulary.


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A decoding method. Its options are the fields of the class.

    `model.generate(**inputs, custom_generate=method, null_inputs=null)` decodes with it: greedily, by sampling or with beams, as the
    other arguments of `generate` say. A method that contrasts needs `null_inputs`, the model's inputs for the same conversations
    without the right images; `options` makes them. Prompts and null prompts of the same length share a batch;
    `vig.decoding.branches.joined` says when null prompts have passes of their own. A method of strength 0 is plain decoding, bit for
    bit. `stop_strings` are refused, because transformers does not pass on the tokenizer.
    """

    name: ClassVar[str]

    @property
    def contrasts(self) -> bool:
        """Return whether the method needs a second pass with null inputs."""
        return False

    def attention(self, model: PreTrainedModel, input_ids: Tensor, inputs: Mapping[str, Any]) -> EditedAttention | None:
        """Return the edited attention for prompts [R, P] with the model's other inputs; None for a method that edits no attention."""
        return None

    def combine(self, logits: Tensor, null_logits: Tensor, step: int) -> Tensor:
        """Return the logits [R, V] to decode from, given both passes' logits [R, V] and the number of the token, from 1 on."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Return the name with all options, as `build_decoding` reads it."""
        return ":".join([self.name, *(f"{field.name}={getattr(self, field.name)}" for field in fields(self))])

    def null_chat(self, chat: Chat) -> Chat:
        """Return the conversation of the null branch."""
        return chat

    def options(self, chats: Sequence[Chat], encode: Callable[[list[Chat]], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the further arguments of `model.generate` for conversations; empty for conversations without images.

        Args:
            encode: returns the model's inputs for conversations.
        """
        if not any(map(has_image, chats)):
            return {}
        null = {"null_inputs": encode([self.null_chat(chat) for chat in chats])} if self.contrasts else {}
        return {"custom_generate": self, **null}

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        null_inputs: Mapping[str, Any] | None = None,
        stop_strings: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Return what `generate` returns. transformers calls this with its prepared arguments.

        Raises:
            ValueError: for a contrast without null inputs, for another search than greedy, sampling and beams, for `stop_strings`, and
                for a model whose attention cannot be edited, or a prompt in chunks where it is edited.
        """
        loop, further = _search(self.name, model, generation_config, inspect.currentframe())
        if stop_strings is not None:
            raise ValueError(
                f"{self.name} gets no tokenizer from transformers, so it cannot stop at stop_strings={stop_strings!r}: "
                "give stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)]"
            )
        arguments = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria, "generation_config": generation_config}
        arguments |= further
        attention = self.attention(model, input_ids, model_kwargs)
        if attention is not None and (size := generation_config.prefill_chunk_size):
            raise ValueError(f"{self.name} edits attention in one pass over the prompt; leave out prefill_chunk_size={size}")
        if not self.contrasts and attention is None:
            return getattr(model, loop)(input_ids, **arguments, **model_kwargs)
        branches = [Branch(model, input_ids, model_kwargs, generation_config)]
        with kept_offsets(model):
            if self.contrasts:
                if null_inputs is None:
                    raise ValueError(f"{self.name} contrasts with a null image: give null_inputs, as {type(self).__name__}.options does")
                branches.append(null_branch(branches[0], null_inputs))
                both = joined(*branches) if attention is None else None
                branches = branches if both is None else [both]
            runner = Branches(self, branches, input_ids.shape[1], attention)
            made = getattr(type(model), loop)(runner, input_ids, **arguments, **model_kwargs)
        if len(branches[0].ids) > len(input_ids):
            branches[0].reorder(torch.arange(len(input_ids), device=input_ids.device))  # a conversation goes on without the null rows
        return made


def _search(name: str, model: PreTrainedModel, config: GenerationConfig, frame: FrameType | None) -> tuple[str, dict[str, Any]]:
    """Return the name of transformers' loop, and the arguments that transformers (5.24) passes to its own loops only.

    They are variables of `generate`, whose frame called the given frame.
    """
    given = {} if frame is None or frame.f_back is None else frame.f_back.f_locals
    mode = config.get_generation_mode(given.get("assistant_model"))
    loop = GENERATION_MODES_MAPPING[mode]
    if loop not in ("_sample", "_beam_search"):
        raise ValueError(f"{name} decodes greedily, by sampling or with beams; got {mode.value}")
    further = model._extract_generation_mode_kwargs(None, {}, given.get("synced_gpus"), None, given.get("streamer"))
    model._validate_generation_mode(mode, config, further)
    return loop, further
