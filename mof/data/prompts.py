"""These functions make prompts end where the answer begins, whatever the tokenizer would append."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from mof.data.answer_tokens import CROSS_MASK
from mof.data.cross_attention import keep_to_own_images
from mof.data.templates import refuse_endless


def ready_for_prompts(processor: ProcessorMixin) -> None:
    """Make the processor's tokenizer append nothing, and try the chat template, which may come from an untrusted checkpoint.

    For Llama 3.2 Vision, keep the prompts of a batch apart (`mof.data.cross_attention`).

    Raises:
        ValueError: for a chat template that does not come to an end (`mof.data.templates`).
    """
    append_nothing(processor.tokenizer)
    refuse_endless(processor)
    if CROSS_MASK in processor.model_input_names:
        keep_to_own_images()


def prompt_inputs(processor: ProcessorMixin, chats: Sequence[Sequence[Mapping[str, Any]]], **options: Any) -> BatchFeature:
    """Return the model's inputs for conversations, by the processor's `apply_chat_template` with these options.

    `.to(device, dtype)` moves them, and casts floats (pixels) only.

    Raises:
        TemplateBoundsError: for a conversation with which the chat template does not come to an end.
    """
    for chat in chats:
        refuse_endless(processor, chat)
    return BatchFeature(processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt", **options))


def append_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer put no token behind a text. Tokens that it puts in front of a text stay.

    Some tokenizers put the end-of-sequence token behind every text. A model that sees this token behind a question believes that the
    conversation is finished. Answers lose nothing, because chat templates write the end of a turn themselves.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.post_processor is None:
        return
    state = json.loads(backend.post_processor.__getstate__())
    opened = _without_end(state)
    if opened != state:
        whole = json.loads(backend.to_str())
        whole["post_processor"] = opened
        backend.post_processor = type(backend).from_str(json.dumps(whole)).post_processor


def _without_end(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a post-processor of `tokenizers` without the pieces that it puts behind a single text."""
    if state["type"] == "Sequence":
        return {**state, "processors": [_without_end(inner) for inner in state["processors"]]}
    if state["type"] == "TemplateProcessing":
        last = max(index for index, piece in enumerate(state["single"]) if "Sequence" in piece)
        return {**state, "single": state["single"][: last + 1]}
    if state["type"] in ("BertProcessing", "RobertaProcessing"):  # these put a token in front of the text and another behind the text
        name, id = state["cls"]
        front = {"SpecialToken": {"id": name, "type_id": 0}}
        first, second = ({"Sequence": {"id": text, "type_id": 0}} for text in "AB")
        known = {name: {"id": name, "ids": [id], "tokens": [name]}}
        return {"type": "TemplateProcessing", "single": [front, first], "pair": [front, first, second], "special_tokens": known}
    return state
