"""assemble makes a `Checkpoint` of the parts of any layout, and `MoFForConditionalGeneration.from_checkpoint` joins them to a model.

Weight files are mapped into memory, not copied. So a tensor takes memory once, when it is used (14 GB for 7B parameters in half precision,
which the system can drop and read again), and a conversion takes no further memory. The files must not change while the model is in use.
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
    """Checkpoint holds the parts that were read from a folder of LLaVA's, MoF's or transformers' code."""

    mixer: InterleavedMoF
    language_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str
    """Chat template."""
    fit: Fit
    """Way in which images become square."""
    embed_encoders: bool
    """True if the checkpoint holds the weights of its encoders."""
    layout: str
    tensors: int
    """Number of tensors in the checkpoint."""
    unused: list[str]
    """Keys of the tensors that the model does not use."""


@dataclass
class OwnCheckpoint:
    """OwnCheckpoint names a folder of this library, which `from_pretrained` reads, and the folder of its LoRA adapter, if it has one."""

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
    """Build the language model and the mixer, and load the weights of each part. Missing and unexpected keys are refused.

    Args:
        text: the configuration of the language model.
        encoders: name in the layout -> encoder with its weights.
        projectors: the kind of the adapters, see `mof.adapter.build_projector`.
        lora: the folder of a LoRA adapter of the language model.

    Raises:
        WeightsError: for keys that are missing, unexpected or of another shape; the message names them.
    """
    source, state = parts.source, parts.tensors[LANGUAGE_MODEL]
    if not state:
        raise WeightsError(f"{source} holds no language model")
    llm = load_pretrained(MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], text, state, f"the language model in {source}")
    if lora is not None:  # before the image token's row is added, because the adapter was trained without this row
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
    """Add the image token. A new row is the mean of the other rows, so that every conversion gives the same weights."""
    rows = llm.get_input_embeddings().num_embeddings
    add_image_token(tokenizer, llm)
    for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        table: Any = layer.weight
        table[rows:] = table[:rows].float().mean(dim=0).to(table.dtype)  # [new rows, D]


def choose_template(saved: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template that the checkpoint holds if it knows images, else a template of `mof.chat_templates`."""
    return saved if saved is not None and IMAGE_PLACEHOLDER in saved else choose_chat_template(tokenizer)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's config.json.

    Raises:
        ValueError: for a file that is missing or unreadable; the message names it.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: expected the folder of a checkpoint, with its config.json")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} should hold a JSON object, not {type(config).__name__}")
    return config


def read_generation(folder: Path) -> GenerationConfig | None:
    """Return generation_config.json without sampling settings that greedy decoding ignores, because transformers refuses to save them."""
    if not (folder / "generation_config.json").is_file():
        return None
    config = GenerationConfig.from_pretrained(folder)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config
