"""The collator makes a training batch from records: padded tokens, and labels for supervised tokens. Unusable records are left out."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import ProcessorMixin

from encoders import StoredImages
from encoders.images.reading import ImageError
from mof.data.answer_tokens import CROSS_MASK, PER_TOKEN, Example, encode_record
from mof.data.cross_attention import keep_to_own_images
from mof.data.forms import to_mapping
from mof.data.records import Record, RecordError, shown, to_record

# Shapes: R records, T tokens of a record, L tokens of the longest record, A answer tokens of a record.

MOST_FAILURES = 50  # this number of unusable records before the first usable image is an error

BLANK_TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "-"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "-"}]},
]

logger = logging.getLogger(__name__)


class OtherTokensError(RecordError):
    """An OtherTokensError says that a token mask was made for other answer tokens than the record has."""


def collate(
    examples: Sequence[Example], pad_token_id: int, padding_side: str = "right", keep: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the batch of R examples: input_ids, attention_mask and labels [R, L], and the images of all records in order.

    Args:
        keep: bool [T] for each example, in place of its answer mask. The label of a token with False is -100.
    """
    masks = [example.answer_mask for example in examples] if keep is None else keep
    examples = _with_hidden_images(examples)
    ids = [example.input_ids for example in examples]  # R of [T]
    labels = [torch.where(mask, tokens, -100) for tokens, mask in zip(ids, masks, strict=True)]  # R of [T]
    batch = {
        "input_ids": _pad(ids, pad_token_id, padding_side),
        "attention_mask": _pad([torch.ones_like(tokens) for tokens in ids], 0, padding_side),
        "labels": _pad(labels, -100, padding_side),
    }
    for key in dict.fromkeys(key for example in examples for key in example.images):
        values = [example.images[key] for example in examples if key in example.images]
        batch[key] = _pad(values, 0, padding_side) if key in PER_TOKEN else _join(values)  # [M, ...]
    return batch


def _with_hidden_images(examples: Sequence[Example]) -> Sequence[Example]:
    """Return the examples; for a model with cross-attention to images, records without an image get a black image that is masked.

    Llama 3.2 Vision takes images and masks for all records of a batch, or for none.
    """
    donor = next((example.images for example in examples if CROSS_MASK in example.images), None)
    if donor is None:
        return examples
    keep_to_own_images()
    hidden = {key: torch.zeros_like(value) for key, value in donor.items()}
    shape = donor[CROSS_MASK].shape[2:]
    return [
        example
        if CROSS_MASK in example.images
        else replace(example, images={**hidden, CROSS_MASK: hidden[CROSS_MASK].new_zeros(1, len(example.input_ids), *shape)})
        for example in examples
    ]


def _join(values: Sequence[Tensor]) -> Tensor:
    """Return the values [M_r, ...] of the records as [M, ...]. Records with fewer tiles per image are padded with zeros."""
    sizes = [max(lengths) for lengths in zip(*(value.shape[1:] for value in values), strict=True)]
    padding = [[x for size, most in zip(value.shape[:0:-1], sizes[::-1], strict=True) for x in (0, most - size)] for value in values]
    return torch.cat([F.pad(value, pad) if any(pad) else value for value, pad in zip(values, padding, strict=True)])


def _pad(rows: Sequence[Tensor], value: int, side: str) -> Tensor:
    """Return R rows [T] padded to [R, L]."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


class SupervisedCollator:
    """SupervisedCollator is the `data_collator` of a Trainer. It makes a training batch from raw record dicts, padded on the right.

    A record may have a "token_mask": a bool for each answer token, in order. A token with False stays in context, but takes no part
    in the loss. Instead, it may have "token_weights": a number from 0 up for each answer token; 0 works like False. The batch then
    has "token_weights" [R, L] too, in which answer tokens of other records have weight 1; `vig.SelectiveTrainer` uses them.

    With several processes (torchrun, accelerate), all must run the same parts of a model. Otherwise FSDP, ZeRO-3 and a few uses of DDP
    hang. A batch without an image then gets an additional record, with a blank image and without loss.

    Args:
        max_length: tokens; longer conversations are cut at the end, and their token masks too.
        image_folder: the folder in which relative image paths start.
        stored_images: a store in which images are looked up instead of being read.
        strict: raise the error of a record that cannot be used, because of its form, its image or its token mask, or because the chat
            template or the processor fails. By default, the record is logged and left out, and a batch that loses all of its records
            gets a record without an answer, so that a damaged file does not end a run of days.

    Raises:
        ImageError, RecordError: with `strict`; without it, if none of the first images can be used.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int = 2048,
        image_folder: str | os.PathLike[str] | None = None,
        stored_images: StoredImages | None = None,
        strict: bool = False,
    ) -> None:
        self.processor, self.max_length, self.image_folder = processor, max_length, image_folder
        self.stored_images, self.strict = stored_images, strict
        self._left_out = torch.zeros((), dtype=torch.int64).share_memory_()  # all worker processes share this number
        self._any_was_used, self._failures = False, 0  # in this process
        if CROSS_MASK in processor.model_input_names:
            keep_to_own_images()  # batches may be made in worker processes, but the model is in this process

    @property
    def left_out(self) -> int:
        """Return the number of times that a record was left out so far, in this process and in the workers that it started."""
        return int(self._left_out)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of R records, as `collate` makes it."""
        examples, weights, with_image = [], [], False
        records = [to_mapping(raw) for raw in records]
        for raw in records:
            try:
                record = to_record(raw, self.image_folder)
                example = encode_record(self.processor, record, max_length=self.max_length, stored_images=self.stored_images)
                self._refuse_misplaced_images(example, len(record.images))
                weights.append(_token_weights(example, raw))
            except (ImageError, RecordError) as error:
                self._leave_out(error)
                continue
            with_image |= bool(record.images)
            self._any_was_used |= with_image
            examples.append(example)
        if not (with_image or self.stored_images) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            blank = encode_record(self.processor, Record("blank", BLANK_TURNS, [Image.new("RGB", (64, 64))]), max_length=sys.maxsize)
            examples, weights = [*examples, blank], [*weights, torch.zeros(len(blank.input_ids))]
        elif not examples:
            examples, weights = [Example("", torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))], [torch.zeros(2)]
        pad_token_id = self.processor.tokenizer.pad_token_id  # padding is masked, so any id is right
        batch = collate(examples, 0 if pad_token_id is None else pad_token_id, keep=[weight > 0 for weight in weights])
        if any(isinstance(raw, Mapping) and raw.get("token_weights") is not None for raw in records):
            batch["token_weights"] = _pad(weights, 0, "right")  # [R, L]
        return batch

    def _refuse_misplaced_images(self, example: Example, images: int) -> None:
        if "qformer_input_ids" in example.images and images != 1:  # InstructBLIP would give an image to the question of another record
            name = type(self.processor).__name__
            raise RecordError(f"record {example.id!r} has {images} images, but {name} takes one image with each question")

    def _leave_out(self, error: ImageError | RecordError) -> None:
        self._failures += 1
        if self.strict or (self._failures == MOST_FAILURES and not self._any_was_used):  # probably the wrong folder
            raise error
        logger.warning("%s; the record is left out", error)
        self._left_out += 1


def _token_weights(example: Example, raw: Mapping[str, Any]) -> Tensor:
    """Return float [T]: "token_weights" or "token_mask" at the record's answer tokens (1 if it has neither), and 0 at other tokens."""
    weights = example.answer_mask.float()  # [T]
    given = [key for key in ("token_mask", "token_weights") if raw.get(key) is not None]
    if len(given) > 1:
        raise RecordError(f"record {example.id!r} has a token_mask and token_weights; give one of them")
    for key in given:
        answers = int(example.answer_mask.sum())
        try:
            values = torch.as_tensor(raw[key], dtype=torch.float32)  # [A]
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise RecordError(f"record {example.id!r}: {key} must be a list of numbers, got {shown(raw[key])}") from error
        if values.shape != (answers,):
            raise OtherTokensError(
                f"record {example.id!r}: {key} has {' x '.join(map(str, values.shape)) or 1} values for {answers} answer tokens; "
                "scores made with another tokenizer, chat template or max_length do not fit"
            )
        if not ((values >= 0) & values.isfinite()).all():
            raise RecordError(f"record {example.id!r}: {key} must be finite numbers from 0 up, got {shown(values.tolist())}")
        weights[example.answer_mask] = values
    return weights
