"""These functions read a model with its processor from any known layout, and write both in any known layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mof.llava.export import save_original
from mof.llava.hf import save_hf_llava
from mof.llava.keys import HF_LLAVA, LLAVA, MOF
from mof.llava.parts import OwnCheckpoint
from mof.llava.reading import Folder, read_checkpoint
from mof.llava.weights import open_weights
from mof.model import MoFForConditionalGeneration
from mof.processor import MoFProcessor


@dataclass
class Loaded:
    """Loaded holds the model and the processor of a checkpoint that was read."""

    model: MoFForConditionalGeneration
    processor: MoFProcessor
    layout: str
    tensors: int
    """Number of tensors in the checkpoint."""
    unused: list[str] = field(default_factory=list)
    """Keys of the tensors that the model does not use."""


def load_checkpoint(folder: Folder, **options: Any) -> Loaded:
    """Return the model and the processor of a checkpoint folder in any known layout.

    Args:
        folder, **options: the arguments of `mof.llava.reading.read_checkpoint`: base, layout, vision_tower, dino_tower,
            released_preprocessing.

    Raises:
        ValueError: (mostly WeightsError) for a file or keys that are missing, unexpected, misshapen or ambiguous; the message names
            them.
    """
    checkpoint = read_checkpoint(folder, **options)
    model = MoFForConditionalGeneration.from_checkpoint(checkpoint)
    if isinstance(checkpoint, OwnCheckpoint):
        saved = checkpoint.folder
        return Loaded(model, MoFProcessor.from_pretrained(saved), "mof", len(open_weights(saved)))
    processor = MoFProcessor.from_parts(model, checkpoint.tokenizer, chat_template=checkpoint.template)
    images, first = processor.image_processor, next(iter(checkpoint.mixer.encoders.values()))
    images.fit, images.interpolation = checkpoint.fit, first.preprocessing.interpolation
    images.centre = "floor"  # as in transformers
    images.background = [int(255 * channel) for channel in first.mean]  # rounded down, as in LLaVA
    return Loaded(model, processor, checkpoint.layout, checkpoint.tensors, checkpoint.unused)


def save_checkpoint(loaded: Loaded, folder: Path, layout: str) -> None:
    """Write a model and its processor in one of the layouts: "mof", "hf-llava", "llava" or "released-mof".

    Raises:
        ValueError: for a model that the layout cannot hold.
    """
    if layout == HF_LLAVA.name:
        save_hf_llava(loaded.model, loaded.processor, folder)
    elif layout in (LLAVA.name, MOF.name):
        save_original(loaded.model, loaded.processor, folder, LLAVA if layout == LLAVA.name else MOF)
    else:
        loaded.model.save_pretrained(folder)
        loaded.processor.save_pretrained(folder)
