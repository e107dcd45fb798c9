"""encode_record turns a record into tokens and marks the answer tokens. Training and scoring use it, for any chat template.

`mof.data.answer_spans` finds the characters of the answers, and the tokenizer gives the characters of each token. The processor
replaces an image placeholder by many tokens, which shifts the tokens after it. So the tokens of the plain text are aligned with the
processor's tokens, and only tokens of images may differ. A processor that takes question and answer separately (PaliGemma) marks the
answer tokens itself.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from encoders import StoredImage, StoredImages
from encoders.images.reading import ImageError, read_image
from mof.data.answer_spans import render_answers
from mof.data.records import ImageSource, Record, RecordError
from mof.data.templates import Span, template_of

# Shapes: T tokens of a record, A answer tokens among them.

ATTENTION_MASK = "attention_mask"
"""Where an example has it: int64 [T], 0 for tokens that no token may attend to."""
# A few processors return these outputs, which hold a value for each token. They are cut and padded with the ids.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", ATTENTION_MASK)
CROSS_MASK = "cross_attention_mask"  # [1, T, ...], in Llama 3.2 Vision: it says which tokens of a record see which image


@dataclass(frozen=True)
class Example:
    """An example is a record as tokens."""

    id: str
    """The record's id."""
    input_ids: Tensor
    """int64 [T], image placeholders expanded."""
    answer_mask: Tensor
    """bool [T]: the assistant's tokens of every turn, with the end-of-turn tokens that the template puts into its spans."""
    images: dict[str, Tensor] = field(default_factory=dict)
    """Further outputs of the processor, for example pixel_values; empty without images."""
    answer: str = ""
    """The answers of all turns in order, as the chat template writes them, end-of-turn marks included."""
    characters: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    """int64 [A, 2]: each answer token covers characters start..end-1 of `answer`. Two tokens may share a character."""
    images_end: int = 0
    """The number of tokens up to the end of the last image, with the marks that the processor puts around it; 0 without images."""


def encode_record(
    processor: ProcessorMixin,
    record: Record,
    *,
    max_length: int = 2048,
    images: Sequence[ImageSource | StoredImage] | None = None,
    stored_images: StoredImages | None = None,
) -> Example:
    """Return a record as tokens. A token that holds a character of an answer is an answer token.

    Args:
        max_length: tokens; a longer conversation is cut at the end.
        images: images that replace the record's images, in the same number.
        stored_images: a store in which images are looked up instead of being read, for a processor that takes stored images
            (`MoFProcessor`).

    Raises:
        ValueError: for a processor without a chat template, or a tokenizer without offsets.
        RecordError: for a record without an answer, tokens that cannot be aligned, an image that does not fit into
            `max_length`, and for any other error of the template or the processor.
        ImageError: for an image that cannot be read; the message names the record too.
    """
    refuse_unusable(processor)
    try:
        return _encode(processor, record, max_length, record.images if images is None else images, stored_images or read_image)
    except ImageError as error:
        raise ImageError(f"record {record.id!r}: {error}") from error
    except (RecordError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # templates and processors raise errors of any kind for odd conversations, images or texts with marks
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise RecordError(f"record {record.id!r}: {kind}{error}") from error


def refuse_unusable(processor: ProcessorMixin) -> None:
    """Raise a ValueError for a processor with which no record can be encoded: no chat template, or no character offsets."""
    if template_of(processor) is None:
        raise ValueError("the processor has no chat template: set processor.chat_template (mof.chat_templates has two)")
    if not processor.tokenizer.is_fast:
        raise ValueError(f"{type(processor.tokenizer).__name__} gives no character offsets; load the fast tokenizer")


def _encode(
    processor: ProcessorMixin, record: Record, max_length: int, given: Sequence[ImageSource | StoredImage], read: Callable[[Any], Any]
) -> Example:
    images = [image if isinstance(image, StoredImage) else read(image) for image in given]
    text, spans = render_answers(processor, record)
    if "suffix" in inspect.signature(processor.__call__).parameters:
        return _encode_suffix(processor, record, text, spans, images, max_length)
    # A template that writes <s> itself must not get a second <s>; transformers decides it in the same way.
    bos = processor.tokenizer.bos_token
    specials = not (bos and text.startswith(bos))
    nested = [images] if images else None  # a list per conversation, because a few processors cut an image into tiles only if it is alone
    outputs = dict(processor(text=[text], images=nested, add_special_tokens=specials, return_tensors="pt"))
    input_ids = outputs.pop("input_ids")[0]  # [T]
    outputs.pop("attention_mask", None)
    plain = processor.tokenizer(text, add_special_tokens=specials, return_offsets_mapping=True)
    answers = _answers(text, plain["offset_mapping"], spans)
    image_token_id = getattr(processor, "image_token_id", None)  # None: a processor that expands nothing
    placeholder = getattr(processor, "image_token", None)  # the mark of an image in the text; mostly the image token
    # In BLIP-2 the placeholder is an object instead of a text.
    placeholder_id = image_token_id if placeholder is None else processor.tokenizer.convert_tokens_to_ids(str(placeholder))
    inside = [characters is not None for characters in answers]
    texts, masks = _between(plain["input_ids"], inside, placeholder_id)
    mask, last_text = _align(record.id, texts, masks, input_ids.tolist(), image_token_id)
    answer = "".join(text[start:end] for start, end in spans)
    characters = torch.tensor([span for span in answers if span is not None], dtype=torch.int64).reshape(-1, 2)  # [A, 2]
    return _cut(Example(record.id, input_ids, torch.tensor(mask), outputs, answer, characters, last_text if images else 0), max_length)


def _encode_suffix(
    processor: ProcessorMixin, record: Record, text: str, spans: list[Span], images: Sequence[Any], max_length: int
) -> Example:
    """Return the example of a processor that takes the question as text and the answer as suffix. Answer tokens have type 1."""
    if len(spans) != 1:
        raise RecordError(
            f"record {record.id!r} has {len(spans)} answers, but {type(processor).__name__} takes one question and one answer"
        )
    if not images:
        raise RecordError(f"record {record.id!r} has no image, but {type(processor).__name__} takes an image with each question")
    start, end = spans[0]
    answer = text[start:end].removesuffix(processor.tokenizer.eos_token)  # the processor adds it
    question = {"text": [text[:start]], "images": [images]}
    outputs = dict(processor(**question, suffix=[answer], return_offsets_mapping=True, return_tensors="pt"))
    input_ids, types = outputs.pop("input_ids")[0], outputs["token_type_ids"][0]  # [T], [T]
    characters = outputs.pop("offset_mapping")[0][types == 1]  # [A, 2]
    for key in ("attention_mask", "labels"):
        outputs.pop(key, None)
    answer += processor.tokenizer.eos_token
    places = (input_ids == processor.image_token_id).nonzero().flatten().tolist()
    images_end = places[-1] + 1 if places else 0
    return _cut(Example(record.id, input_ids, types == 1, outputs, answer, characters, images_end), max_length)


def _cut(example: Example, max_length: int) -> Example:
    """Return the first `max_length` tokens, and the outputs per token without their batch dimension.

    Raises:
        RecordError: if the cut removes a token of an image, because its features would have no place, or all answer tokens.
    """
    if example.images_end > max_length:
        raise RecordError(
            f"record {example.id!r}: its images end at token {example.images_end}, but max_length is {max_length}; raise max_length or pool"
        )
    per_token = {key: example.images[key][0, :max_length] for key in PER_TOKEN if key in example.images}  # [T]
    if CROSS_MASK in example.images:
        per_token[CROSS_MASK] = example.images[CROSS_MASK][:, :max_length]
    ids, mask = example.input_ids[:max_length], example.answer_mask[:max_length]  # [T], [T]
    if not mask.any():
        answers = int(example.answer_mask.sum())
        late = f": none of its {answers} answer tokens lies within max_length={max_length}; raise max_length, or"
        raise RecordError(f"record {example.id!r}{late if answers else ' has only empty answers;'} take the record out")
    characters = example.characters[: int(mask.sum())]  # [A, 2]
    answer = example.answer[: int(characters[-1, 1]) if len(characters) else 0]
    return Example(example.id, ids, mask, example.images | per_token, answer, characters, example.images_end)


def _answers(text: str, offsets: Sequence[Span], spans: Sequence[Span]) -> list[Span | None]:
    """Return for each token its characters in the joined answers, or None for a token outside of the answers.

    The tokens of an answer are all tokens from the first to the last that overlaps its span. Some tokenizers leave white space out of
    the offsets; a token of white space alone then has an empty span at its end. A token such as " USER" may share white space with the
    end of an answer's span, but it is a word of the template.
    """
    answers: list[Span | None] = [None] * len(offsets)
    before, first = 0, 0  # number of characters of the earlier answers; first token that may reach into the answer
    for start, end in spans:
        while first < len(offsets) and offsets[first][1] <= start:
            first += 1
        last = first  # the token behind the answer
        for i in range(first, len(offsets)):
            left, right = offsets[i]
            if (left >= end and not left == right == end) or (right > end and text[left:end].isspace()):
                break
            last = i + 1 if right > start else last  # a token without characters, such as a mark at the end, does not count
        for i in range(first, last):
            left, right = (before + min(max(place, start), end) - start for place in offsets[i])
            answers[i] = (left, right)
        before += end - start
    return answers


def _align(
    record_id: str, texts: list[list[int]], masks: list[list[bool]], expanded: list[int], image_token_id: int | None
) -> tuple[list[bool], int]:
    """Return the answer mask of the expanded tokens, and the number of tokens before the last text.

    The texts between the placeholders and their masks come from `_between`. Between the texts lie image tokens, and around these
    marks of the processor. They cannot be an answer, because images belong to the user's messages. A few processors put tokens
    before all texts (BLIP-2 its image tokens, Molmo 2 and Emu3 a token for the beginning) or behind all (Chameleon).
    """
    mask, end = [False] * len(expanded), 0
    places = [place for place, token in enumerate(expanded) if token == image_token_id]
    for index, (text, inside) in enumerate(zip(texts, masks, strict=True)):
        if index:  # behind an image; Ovis2 also writes tokens other than the image token
            following = bisect_left(places, end)
            end = (places[following] if following < len(places) else end) + 1
        starts = range(end, len(expanded) - len(text) + 1)
        in_turn = reversed(starts) if index == len(texts) - 1 else starts
        start = next((at for at in in_turn if expanded[at : at + len(text)] == text), None)
        if start is None:
            raise RecordError(
                f"record {record_id!r}: the processor changes more than the number of image tokens (id {image_token_id}): "
                f"{sum(map(len, texts))} tokens of text cannot be aligned with {len(expanded)} tokens of the processor"
            )
        end = start + len(text)
        mask[start:end] = inside
    return mask, end - len(texts[-1])


def _between(ids: list[int], answers: list[bool], placeholder_id: int | None) -> tuple[list[list[int]], list[list[bool]]]:
    """Return the tokens before, between and after runs of image placeholders, and for each of these texts the mask of its answers."""
    texts: list[list[int]] = [[]]
    masks: list[list[bool]] = [[]]
    for is_image, run in groupby(zip(ids, answers, strict=True), key=lambda pair: pair[0] == placeholder_id):
        if is_image:
            texts.append([])
            masks.append([])
        else:
            for token, answer in run:
                texts[-1].append(token)
                masks[-1].append(answer)
    return texts, masks
