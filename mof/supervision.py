"""Which tokens are answers: one code for whoever trains and whoever scores, for any processor with a chat template.

The chat template says in characters where the assistant speaks (`{% generation %}`). The tokenizer says in characters where
tokens lie. The processor then makes many tokens of one image placeholder, which shifts what follows; so the tokens of the
plain text are aligned with the processor's one by one, and only what stands for an image may differ. A processor that takes
question and answer apart (PaliGemma's) says itself which tokens it made of the answer.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from encoders import StoredImage, StoredImages
from encoders.images.reading import ImageError, read_image
from mof.records import ImageSource, Record, RecordError, to_record

# Shapes: R records, T tokens of a record, L tokens of the longest, A answer tokens of a record.

# What some processors give besides ids, one value per token. It is cut and padded with the ids.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")

MOST_FAILURES = 50  # images that cannot be read before the first that can

logger = logging.getLogger(__name__)

Span = tuple[int, int]  # characters start..end-1


@dataclass(frozen=True)
class Example:
    """A record as tokens."""

    id: str
    """The record's id."""
    input_ids: Tensor
    """int64 [T], image placeholders expanded."""
    answer_mask: Tensor
    """bool [T]: the assistant's tokens of every turn, with the end-of-turn tokens that the template puts into its spans."""
    images: dict[str, Tensor] = field(default_factory=dict)
    """What else the processor gives, such as pixel_values; empty without images."""
    answer: str = ""
    """The answers of all turns one after the other, as the chat template writes them, end-of-turn marks included."""
    characters: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    """int64 [A, 2]: each answer token is characters start..end-1 of `answer`. Tokens that share a character both have it."""


def encode_record(
    processor: ProcessorMixin,
    record: Record,
    *,
    max_length: int = 2048,
    images: Sequence[ImageSource | StoredImage] | None = None,
    stored_images: StoredImages | None = None,
) -> Example:
    """Tokenise a conversation and find its answer tokens. A token that holds a character of an answer is one.

    Args:
        max_length: longer conversations are cut at the end.
        images: in place of the record's own, in number the same.
        stored_images: look the images up there instead of reading them. For a processor that takes such: `MoFProcessor`.

    Raises:
        ValueError: for a template without generation spans, or a tokenizer without offsets.
        RecordError: for a record without an answer, tokens that cannot be aligned, or an image that does not fit into
            `max_length`.
        ImageError: for an image that cannot be read, naming the record too.
    """
    try:
        read = stored_images or read_image
        images = [one if isinstance(one, StoredImage) else read(one) for one in (record.images if images is None else images)]
    except ImageError as error:
        raise ImageError(f"record {record.id!r}: {error}") from error
    text, spans = _render(processor, record)
    if "suffix" in inspect.signature(processor.__call__).parameters:
        return _encode_suffix(processor, record, text, spans, images, max_length)
    # As transformers does it: a template that writes <s> itself must not get a second one.
    bos = processor.tokenizer.bos_token
    specials = not (bos and text.startswith(bos))
    try:
        nested = [images] if images else None  # one list per conversation: some processors cut up a lone image only
        outputs = dict(processor(text=[text], images=nested, add_special_tokens=specials, return_tensors="pt"))
    except Exception as error:
        raise _refused(record, error) from error
    input_ids = outputs.pop("input_ids")[0]  # [T]
    outputs.pop("attention_mask", None)
    plain = processor.tokenizer(text, add_special_tokens=specials, return_offsets_mapping=True)
    answers = _answers(plain["offset_mapping"], spans)
    image_token_id = getattr(processor, "image_token_id", None)  # None: a processor that expands nothing
    inside = [characters is not None for characters in answers]
    mask = _align(record.id, plain["input_ids"], inside, input_ids.tolist(), image_token_id)
    answer = "".join(text[start:end] for start, end in spans)
    characters = torch.tensor([span for span in answers if span is not None], dtype=torch.int64).reshape(-1, 2)  # [A, 2]
    return _cut(Example(record.id, input_ids, torch.tensor(mask), outputs, answer, characters), image_token_id, max_length)


def _encode_suffix(
    processor: ProcessorMixin, record: Record, text: str, spans: list[Span], images: Sequence[Any], max_length: int
) -> Example:
    """For a processor that takes the question as text and the answer as its suffix: tokens of type 1 are the answer's."""
    if len(spans) != 1:
        raise RecordError(
            f"record {record.id!r} has {len(spans)} answers, but {type(processor).__name__} takes one question and one answer"
        )
    start, end = spans[0]
    answer = text[start:end].removesuffix(processor.tokenizer.eos_token)  # which the processor adds
    question = {"text": [text[:start]], "images": [images] if images else None}
    try:
        outputs = dict(processor(**question, suffix=[answer], return_offsets_mapping=True, return_tensors="pt"))
    except Exception as error:
        raise _refused(record, error) from error
    input_ids, types = outputs.pop("input_ids")[0], outputs["token_type_ids"][0]  # [T], [T]
    characters = outputs.pop("offset_mapping")[0][types == 1]  # [A, 2]
    for key in ("attention_mask", "labels"):
        outputs.pop(key, None)
    answer += processor.tokenizer.eos_token
    return _cut(Example(record.id, input_ids, types == 1, outputs, answer, characters), processor.image_token_id, max_length)


def _refused(record: Record, error: Exception) -> RecordError:
    """Processors raise many kinds for images of odd shapes, or for texts with marks that they read as images."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return RecordError(f"record {record.id!r}: {kind}{error}")


def _cut(example: Example, image_token_id: int | None, max_length: int) -> Example:
    """The first `max_length` tokens, and without the batch dimension what there is one of per token."""
    _refuse_cut_image(example.id, example.input_ids, image_token_id, max_length)
    per_token = {key: example.images[key][0, :max_length] for key in PER_TOKEN if key in example.images}  # [T]
    ids, mask = example.input_ids[:max_length], example.answer_mask[:max_length]  # [T], [T]
    characters = example.characters[: int(mask.sum())]  # [A, 2]
    answer = example.answer[: int(characters[-1, 1]) if len(characters) else 0]
    return Example(example.id, ids, mask, example.images | per_token, answer, characters)


def _render(processor: ProcessorMixin, record: Record) -> tuple[str, list[Span]]:
    """The conversation as text, and the characters of each answer in it."""
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None or "generation %}" not in template:
        raise ValueError(
            "the chat template does not mark the assistant's words: put {% generation %} and {% endgeneration %} around them, "
            "the end-of-turn token inside, and set processor.chat_template (mof.chat_templates has two that do)"
        )
    if not processor.tokenizer.is_fast:
        raise ValueError(f"{type(processor.tokenizer).__name__} gives no character offsets; load the fast tokenizer")
    answers = sum(message["role"] == "assistant" for message in record.messages)
    if not answers:
        raise RecordError(f"record {record.id!r} has no assistant message, so there is nothing to learn or score")
    texts, spans = render_jinja_template(
        conversations=[record.messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    if len(spans[0]) != answers:
        raise ValueError(
            f"record {record.id!r}: {answers} assistant messages, but the chat template marks {len(spans[0])} generation spans"
        )
    return texts[0], spans[0]


def _answers(offsets: Sequence[Span], spans: Sequence[Span]) -> list[Span | None]:
    """Per token, its characters in all answers put together, or None outside: from the first that overlaps a span to the last.

    Some tokenizers trim white space off their offsets; a token of nothing else is then an empty span at its end.
    """
    answers: list[Span | None] = [None] * len(offsets)
    before = 0  # characters of the answers before this one
    for start, end in spans:
        inside = [i for i, (left, right) in enumerate(offsets) if right > start and (left < end or left == right == end)]
        for i in range(inside[0], inside[-1] + 1) if inside else ():
            left, right = (before + min(max(place, start), end) - start for place in offsets[i])
            answers[i] = (left, right)
        before += end - start
    return answers


def _align(record_id: str, plain: list[int], answers: list[bool], expanded: list[int], image_token_id: int | None) -> list[bool]:
    """`answers` of the plain tokens, for the expanded tokens.

    Between the texts lies what the processor made of the images: image tokens, and around them marks of its own (none of
    which can be an answer, as images belong to the user's messages).
    """
    texts, masks = _between(plain, answers, image_token_id)
    ends = [len(texts[0])] if expanded[: len(texts[0])] == texts[0] else []
    for index, text in enumerate(texts[1:], start=1):
        last = index == len(texts) - 1
        first = (expanded.index(image_token_id, ends[-1]) + 1) if ends and image_token_id in expanded[ends[-1] :] else len(expanded)
        starts = [len(expanded) - len(text)] if last else range(first, len(expanded) - len(text) + 1)
        found = next((at for at in starts if at >= first and expanded[at : at + len(text)] == text), None)
        if found is None:
            break
        ends.append(found + len(text))
    if len(ends) != len(texts) or ends[-1] != len(expanded):
        raise RecordError(
            f"record {record_id!r}: the processor changes more than the number of image tokens (id {image_token_id}): "
            f"{len(plain)} tokens of text cannot be aligned with {len(expanded)} tokens of the processor"
        )
    mask = [False] * len(expanded)
    for end, inside in zip(ends, masks, strict=True):
        mask[end - len(inside) : end] = inside
    return mask


def _between(ids: list[int], answers: list[bool], image_token_id: int | None) -> tuple[list[list[int]], list[list[bool]]]:
    """The tokens before, between and after runs of image tokens, and which of them are answers."""
    texts: list[list[int]] = [[]]
    masks: list[list[bool]] = [[]]
    for is_image, run in groupby(zip(ids, answers, strict=True), key=lambda pair: pair[0] == image_token_id):
        if is_image:
            texts.append([])
            masks.append([])
        else:
            for token, answer in run:
                texts[-1].append(token)
                masks[-1].append(answer)
    return texts, masks


def _refuse_cut_image(record_id: str, input_ids: Tensor, image_token_id: int | None, max_length: int) -> None:
    """The cut may not go through or before an image: its features would have no place."""
    if image_token_id is None:
        return
    places = (input_ids == image_token_id).nonzero()  # [image tokens, 1]
    needed = int(places[-1]) + 1 if len(places) else 0
    if needed > max_length:
        raise RecordError(
            f"record {record_id!r}: its images end at token {needed}, but max_length is {max_length}; raise max_length or pool"
        )


def collate(
    examples: Sequence[Example], pad_token_id: int, padding_side: str = "right", keep: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Examples to a batch: input_ids, attention_mask and labels [R, L], and the images of all records in order.

    Args:
        keep: per example bool [T], in place of its answer mask: where labels are not -100.
    """
    masks = [example.answer_mask for example in examples] if keep is None else keep
    ids = [example.input_ids for example in examples]  # R of [T]
    labels = [torch.where(mask, one, -100) for one, mask in zip(ids, masks, strict=True)]  # R of [T]
    batch = {
        "input_ids": _pad(ids, pad_token_id, padding_side),
        "attention_mask": _pad([torch.ones_like(one) for one in ids], 0, padding_side),
        "labels": _pad(labels, -100, padding_side),
    }
    for key in dict.fromkeys(key for example in examples for key in example.images):
        values = [example.images[key] for example in examples if key in example.images]
        batch[key] = _pad(values, 0, padding_side) if key in PER_TOKEN else _join(values)  # [M, ...]
    return batch


def _join(values: Sequence[Tensor]) -> Tensor:
    """[M_r, ...] of the records -> [M, ...]; zeros fill up where one has fewer tiles per image, as processors do it."""
    sizes = [max(lengths) for lengths in zip(*(value.shape[1:] for value in values), strict=True)]
    padding = [[x for size, most in zip(value.shape[:0:-1], sizes[::-1], strict=True) for x in (0, most - size)] for value in values]
    return torch.cat([F.pad(value, pad) if any(pad) else value for value, pad in zip(values, padding, strict=True)])


def _pad(rows: Sequence[Tensor], value: int, side: str) -> Tensor:
    """R of [T] -> [R, L]."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


class SupervisedCollator:
    """Raw record dicts to a training batch, padded on the right; the `data_collator` of a Trainer.

    A record may carry a "token_mask": one bool per answer token, in order. Where it is false the token stays in context, but
    takes no part in the loss. In its place it may carry "token_weights": one number from 0 up per answer token, 0 like false.
    The batch then has "token_weights" [R, L] too, where tokens of other records weigh 1; `vig.SelectiveTrainer` knows them.

    Args:
        max_length: longer conversations are cut at the end, token masks with them.
        image_folder: where relative image paths start.
        stored_images: look the images up there instead of reading them.
        strict: raise the ImageError of a record whose image cannot be read. By default the record is logged and left out, and
            a batch that loses all of its records has one without an answer: a run of days does not end at a damaged file.

    Raises:
        RecordError: for whatever is wrong with a record.
        ImageError: with `strict`; without it when not one of the first images can be read.
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
        self._left_out = torch.zeros((), dtype=torch.int64).share_memory_()  # one number for all worker processes
        self._any_was_read, self._failures = False, 0  # in this process

    @property
    def left_out(self) -> int:
        """How often a record was left out so far, in this process and the workers that it started."""
        return int(self._left_out)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """R records -> the batch of `collate`."""
        examples, weights = [], []
        for raw in records:
            record = to_record(raw, self.image_folder)
            try:
                example = encode_record(self.processor, record, max_length=self.max_length, stored_images=self.stored_images)
            except ImageError as error:
                self._leave_out(error)
                continue
            self._any_was_read |= bool(record.images)
            examples.append(example)
            weights.append(_token_weights(example, raw))
        if not examples:
            examples, weights = [Example("", torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))], [torch.zeros(2)]
        pad_token_id = self.processor.tokenizer.pad_token_id  # masked out: any id will do where there is none
        batch = collate(examples, 0 if pad_token_id is None else pad_token_id, keep=[one > 0 for one in weights])
        if any(raw.get("token_weights") is not None for raw in records):
            batch["token_weights"] = _pad(weights, 0, "right")  # [R, L]
        return batch

    def _leave_out(self, error: ImageError) -> None:
        self._failures += 1
        if self.strict or (self._failures == MOST_FAILURES and not self._any_was_read):  # rather a wrong folder than bad luck
            raise error
        logger.warning("%s; the record is left out", error)
        self._left_out += 1


def _token_weights(example: Example, raw: Mapping[str, Any]) -> Tensor:
    """float [T]: the record's "token_weights" or "token_mask" at its answer tokens, 1 without either; 0 elsewhere."""
    weights = example.answer_mask.float()  # [T]
    given = [key for key in ("token_mask", "token_weights") if raw.get(key) is not None]
    if len(given) > 1:
        raise RecordError(f"record {example.id!r} has a token_mask and token_weights; give one of them")
    for key in given:
        answers = int(example.answer_mask.sum())
        if len(raw[key]) != answers:
            raise RecordError(
                f"record {example.id!r}: {key} has {len(raw[key])} values for {answers} answer tokens; scores made with "
                "another tokenizer, chat template or max_length do not fit"
            )
        values = torch.as_tensor(raw[key], dtype=torch.float32)  # [A]
        if not ((values >= 0) & values.isfinite()).all():
            raise RecordError(f"record {example.id!r}: {key} must be finite numbers from 0 up, got {values.tolist()}")
        weights[example.answer_mask] = values
    return weights
