"""One model and its processor out of the parts of a checkpoint, whatever layout they came in.

Weight files are mapped into memory, not copied: a tensor costs its size once, when it is used (7B parameters in half precision:
14 GB, which the system can drop and read again), and converting takes no memory of its own. The files must stay as they are
while the model is in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from encoders import Encoder
from encoders.images.resizing import Fit
from encoders.weight_files import WeightsError, load_strict
from mof.adapter import InterleavedMoF
from mof.chat_templates import choose_chat_template
from mof.data.records import IMAGE_PLACEHOLDER
from mof.llava.keys import LANGUAGE_MODEL, Parts, projector, tower
from mof.llava.towers import embed, load_pretrained
from mof.model import MoFForConditionalGeneration
from mof.processor import MoFProcessor


@dataclass
class Loaded:
    """A checkpoint that was read."""

    model: MoFForConditionalGeneration
    processor: MoFProcessor
    layout: str
    tensors: int
    """How many the checkpoint holds."""
    unused: list[str] = field(default_factory=list)
    """The keys among them that the model has no use for."""


@dataclass
class Ingredients:
    """What every layout comes down to."""

    source: Path
    parts: Parts
    weights: Mapping[str, Tensor]
    text: PretrainedConfig
    encoders: dict[str, Encoder]
    projector: str
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    fit: Fit
    generation: GenerationConfig | None


def choose_template(own: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The checkpoint's own chat template if it knows images, else one of ours."""
    return own if own is not None and IMAGE_PLACEHOLDER in own else choose_chat_template(tokenizer)


def assemble(it: Ingredients) -> Loaded:
    """Every part gets its weights, strictly, and becomes one model with its processor."""
    state = it.parts.tensors(LANGUAGE_MODEL, it.weights)
    if not state:
        raise WeightsError(f"{it.source} holds no language model")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(it.text)]
    llm = load_pretrained(kind, it.text, state, f"the language model in {it.source}")
    if it.generation is not None:
        llm.generation_config = it.generation
    mixer = InterleavedMoF(it.encoders, it.text.hidden_size, projector=it.projector)
    for name in it.parts.layout.encoders:
        place = it.parts.layout.place(projector(name), it.source)
        load_strict(mixer.adapters[name], it.parts.tensors(projector(name), it.weights), place)
    embedded = any(tower(name) in it.parts.names for name in it.encoders)
    if embedded:
        for encoder in it.encoders.values():
            embed(encoder)
    rows = llm.get_input_embeddings().num_embeddings
    model = MoFForConditionalGeneration.from_parts(mixer, llm, it.tokenizer, embed_encoders=embedded).eval()
    _fill_new_rows(model, rows)
    processor = MoFProcessor.from_parts(model, it.tokenizer, chat_template=it.template)
    images, first = processor.image_processor, next(iter(it.encoders.values()))
    images.fit, images.interpolation = it.fit, first.preprocessing.interpolation
    images.centre = "floor"  # as image processors of transformers
    images.background = [int(255 * channel) for channel in first.mean]  # cut off, as LLaVA does
    return Loaded(model, processor, it.parts.layout.name, len(it.weights), sorted(it.parts.unused))


@torch.no_grad()
def _fill_new_rows(model: MoFForConditionalGeneration, rows: int) -> None:
    """The image token's rows, where they were added, become the mean of the others: the same in every conversion."""
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        table: Any = layer.weight  # type: ignore[union-attr]
        table[rows:] = table[:rows].float().mean(dim=0).to(table.dtype)  # [new rows, D]
