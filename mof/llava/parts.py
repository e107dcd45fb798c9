"""The parts of a checkpoint, whatever layout they came in; `MoFForConditionalGeneration.from_checkpoint` joins them.

Weight files are mapped into memory, not copied: a tensor costs its size once, when it is used (7B parameters in half precision:
14 GB, which the system can drop and read again), and converting takes no memory of its own. The files must stay as they are
while the model is in use.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from encoders import Encoder
from encoders.images.resizing import Fit
from encoders.weight_files import WeightsError, load_strict
from mof.adapter import InterleavedMoF
from mof.chat_templates import choose_chat_template
from mof.data.records import IMAGE_PLACEHOLDER
from mof.language_models import add_image_token
from mof.llava.keys import LANGUAGE_MODEL, Parts, projector, tower
from mof.llava.towers import embed, load_pretrained
from mof.llava.weights import merge_lora


@dataclass
class Checkpoint:
    """A checkpoint of LLaVA's, MoF's or transformers' code, read into its parts."""

    mixer: InterleavedMoF
    language_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str
    """The chat template."""
    fit: Fit
    """The way in which images become square."""
    embed_encoders: bool
    """True if the checkpoint holds the weights of its encoders."""
    layout: str
    tensors: int
    """The number of tensors in the checkpoint."""
    unused: list[str]
    """The keys of the tensors that the model has no use for."""


@dataclass
class OwnCheckpoint:
    """A folder of this library, which `from_pretrained` reads, and the folder of a LoRA adapter for it, if any."""

    folder: Path
    adapter: Path | None


def assemble(
    parts: Parts,
    *,
    text: PreTrainedConfig,
    encoders: dict[str, Encoder],
    projectors: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    fit: Fit,
    lora: Path | None = None,
) -> Checkpoint:
    """Build language model and mixer; each part gets its weights, and every key is accounted for.

    Args:
        text: the configuration of the language model.
        encoders: by the names that the layout gives them, with their weights.
        projectors: the kind of the adapters, see `mof.adapter.build_projector`.
        lora: the folder of a LoRA adapter of the language model.

    Raises:
        WeightsError: naming each key that is missing, unexpected or of another shape.
    """
    source, state = parts.source, parts.tensors[LANGUAGE_MODEL]
    if not state:
        raise WeightsError(f"{source} holds no language model")
    llm = load_pretrained(MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], text, state, f"the language model in {source}")
    if lora is not None:  # before the image token's row is added: the adapter was trained without it
        llm = merge_lora(llm, lora)
    llm.generation_config = read_generation(source) or llm.generation_config
    mixer = InterleavedMoF(encoders, text.hidden_size, projector=projectors)
    for name, adapter in mixer.adapters.items():
        load_strict(adapter, parts.tensors[projector(name)], parts.place(projector(name)))
    embedded = any(parts.tensors[tower(name)] for name in encoders)
    if embedded:
        for encoder in encoders.values():
            embed(encoder)
    _add_mean_rows(llm, tokenizer)
    return Checkpoint(mixer, llm, tokenizer, template, fit, embedded, parts.layout.name, parts.count, sorted(parts.unused))


@torch.no_grad()
def _add_mean_rows(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the image token. A new row is the mean of the other rows, so that every conversion gives the same."""
    rows = llm.get_input_embeddings().num_embeddings
    add_image_token(tokenizer, llm)
    for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        table: Any = layer.weight
        table[rows:] = table[:rows].float().mean(dim=0).to(table.dtype)  # [new rows, D]


def choose_template(own: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the checkpoint's own chat template if it knows images, else one of `mof.chat_templates`."""
    return own if own is not None and IMAGE_PLACEHOLDER in own else choose_chat_template(tokenizer)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint. A ValueError names the file that is missing or unreadable."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: expected the folder of a checkpoint, with its config.json")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} should hold a JSON object, not {type(config).__name__}")
    return config


def read_generation(folder: Path) -> GenerationConfig | None:
    """Return generation_config.json, without sampling settings that greedy decoding ignores: they may not be saved again."""
    if not (folder / "generation_config.json").is_file():
        return None
    config = GenerationConfig.from_pretrained(folder)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config
