"""A model with its processor, read from any known layout and written in any of them."""

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
    """A checkpoint that was read."""

    model: MoFForConditionalGeneration
    processor: MoFProcessor
    layout: str
    tensors: int
    """The number of tensors in the checkpoint."""
    unused: list[str] = field(default_factory=list)
    """The keys of the tensors that the model has no use for."""


def load_checkpoint(folder: Folder, **options: Any) -> Loaded:
    """Return the model and the processor of a checkpoint folder in any known layout.

    Args:
        folder, **options: as `mof.llava.reading.read_checkpoint` takes them: base, layout, vision_tower, dino_tower,
            released_preprocessing.

    Raises:
        ValueError: (mostly WeightsError) naming the file or the keys that are missing, unexpected, misshapen or ambiguous.
    """
    checkpoint = read_checkpoint(folder, **options)
    model = MoFForConditionalGeneration.from_checkpoint(checkpoint)
    if isinstance(checkpoint, OwnCheckpoint):
        own = checkpoint.folder
        return Loaded(model, MoFProcessor.from_pretrained(own), "mof", len(open_weights(own)))
    processor = MoFProcessor.from_parts(model, checkpoint.tokenizer, chat_template=checkpoint.template)
    images, first = processor.image_processor, next(iter(checkpoint.mixer.encoders.values()))
    images.fit, images.interpolation = checkpoint.fit, first.preprocessing.interpolation
    images.centre = "floor"  # as transformers does it
    images.background = [int(255 * channel) for channel in first.mean]  # cut off, as LLaVA does
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
