"""These functions measure how much a model looks at the image while it answers: attention from answers to image tokens, by layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from encoders.images.reading import ImageError
from encoders.progress import tracked
from mof.data.answer_tokens import encode_record
from mof.data.collator import collate
from mof.data.records import RecordError, to_record
from mof.data.rows import RawRecord, id_of

# Shapes: S = tokens of a record, A = answer tokens among them, H = heads, Y = layers.


@dataclass(frozen=True)
class ImageAttention:
    """ImageAttention holds shares of attention in [0, 1]: means over answer tokens and heads."""

    layers: list[float]
    """[Y] the share that goes to image tokens, the first layer first."""
    even: float
    """The share if attention were spread evenly over all tokens that a position sees: image tokens over tokens."""
    answer_tokens: int
    records: int
    failures: dict[str, str]
    """Id -> reason, for the records that were left out."""


@torch.inference_mode()
def image_attention(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[RawRecord],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    max_length: int = 2048,
    progress: bool = False,
) -> ImageAttention:
    """Return the attention from the positions that predict answer tokens to the image tokens before them.

    Args:
        model: any image-text-to-text model of transformers that puts image tokens between the tokens of the text, loaded with
            attn_implementation="eager", as no other implementation returns attention.
        processor: the model's processor, which knows the `image_token_id`.
        records: raw records; records without an image are passed over.

    Raises:
        ValueError: for a model that does not return its attention, a processor that does not know its image tokens, or when no
            record with an image could be read.
    """
    image_token_id = getattr(processor, "image_token_id", None)
    if image_token_id is None:
        raise ValueError(f"{type(processor).__name__} has no image_token_id, so the image tokens cannot be told from the others")
    model.eval()
    total, even, answers, count = torch.zeros((), device=model.device), 0.0, 0, 0
    failures: dict[str, str] = {}
    for raw in tracked(records, "records", shown=progress):
        try:
            record = to_record(raw, image_folder)
            if not record.images:
                continue
            example = encode_record(processor, record, max_length=max_length)
        except (RecordError, ImageError) as error:
            failures[id_of(raw)] = str(error)
            continue
        batch = collate([example], 0)
        del batch["labels"]
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions  # Y of [1, H, S, S]
        is_image = example.input_ids == image_token_id  # [S]
        places = example.answer_mask.nonzero().flatten() - 1  # [A]: a position predicts the token behind it
        total = total + _shares(attentions, places.to(model.device), is_image.to(model.device))  # [Y]
        even += float((is_image.cumsum(0)[places] / (places + 1)).sum())
        answers, count = answers + len(places), count + 1
    if not answers:
        raise ValueError(
            f"none of {len(records)} records has an image and an answer that could be read: {next(iter(failures.values()), '')}"
        )
    return ImageAttention((total / answers).tolist(), even / answers, answers, count, failures)


def _shares(attentions: Sequence[Tensor] | None, places: Tensor, is_image: Tensor) -> Tensor:
    """Return [Y] the attention to the image: mean over heads, sum over places."""
    if not attentions or any(layer is None or layer.shape[-2:] != (len(is_image),) * 2 for layer in attentions):
        raise ValueError('the model does not return its attention over all tokens; load it with attn_implementation="eager"')
    return torch.stack([layer[0, :, places][..., is_image].float().sum(-1).mean(0).sum() for layer in attentions])
