"""Each record becomes a pair of examples: with its images and with their null images."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from encoders import StoredImages
from encoders.images.reading import ImageError, read_image
from mof.data.answer_tokens import ATTENTION_MASK, Example, encode_record
from mof.data.digests import digest
from mof.data.record_files import UnreadableRow
from mof.data.records import ImageSource, Record, RecordError, shortened, to_record
from mof.data.rows import Row, id_of
from vig.nulls import NullImages, pixel_digest
from vig.scoring.prefix_cache import part

# Shapes: L = tokens of a record, T = answer tokens among them, E = end-of-turn tokens among the answer tokens.

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair holds the examples of a record with its images and with its null images.

    Both examples have the same token ids unless the null image is "drop".
    """

    id: str
    digest: str
    clean: Example
    null: Example
    turn_ends: NDArray[np.int64]
    """[E] indices into the answer tokens."""
    images: str
    """Digest of the record's images; equal for records with the same images."""
    prefix: int
    """Number of tokens up to the last image, which records with the same images may share; 0 if answer tokens are among them."""
    image_files: str = ""
    """See `file_states`."""


@dataclass
class _Images:
    """The images of the last record are kept, because the next record often has the same images."""

    sources: list[ImageSource]
    shown: list[Any]
    """RGB images, or `StoredImage`s."""
    digest: str
    files: str = ""
    """The states of the files before they were read."""
    clean: dict[str, Tensor] | None = None
    """The processor's outputs for these images."""
    null: dict[str, Tensor] | None = None
    """The processor's outputs for their null images, as far as they differ from `clean`."""


@dataclass
class PairReader:
    """PairReader reads records into pairs, and keeps lists of the records that give no pair."""

    processor: ProcessorMixin
    image_folder: str | os.PathLike[str] | None
    nulls: NullImages
    max_length: int
    stored_images: tuple[StoredImages, StoredImages] | None = None
    """The stores of the images and of the null images."""
    image_token_id: int | None = None
    """The model's image token; needed where the null image is "attention"."""
    text_only: list[str] = field(default_factory=list)
    """Ids of records without an image that can be trained on."""
    failures: dict[str, str] = field(default_factory=dict)
    """id -> reason."""
    quiet: bool = False
    """Whether the failures are not logged."""

    def __post_init__(self) -> None:
        self._special_ids = _special_ids(self.processor.tokenizer)
        self._processor = copy.copy(self.processor)
        self._processor.image_processor = RememberedImages(self.processor.image_processor)
        self._last = _Images([], [], "")

    def read(self, raw: Row) -> Pair | None:
        """Return the pair of a record, or None for a record that has no image, cannot be read or has no answer."""
        id = id_of(raw)
        if isinstance(raw, UnreadableRow):
            self.fail(id, raw.reason)
            return None
        try:
            return self._pair(to_record(raw, self.image_folder), digest(raw))
        except (RecordError, ImageError) as error:
            self.fail(id, str(error))
        except ValueError:  # the null images or the processor raised it, and both are the same for every record
            raise
        except Exception as error:  # a record may hold anything
            self.fail(id, f"{type(error).__name__}: {error}")
        return None

    def _pair(self, record: Record, digest: str) -> Pair | None:
        images = self._read_images(record)
        clean = encode_record(self._processor, record, max_length=self.max_length, images=images.shown)
        if not record.images:  # not earlier: training takes text-only records without a score, so they must have been encoded
            self.text_only.append(record.id)
            return None
        null = self._null(record, clean, images)
        images.clean = images.clean or clean.images
        clean = replace(clean, images={**clean.images, **_alike(images.clean, clean.images)})  # records with these images share the tensors
        turn_ends = _turn_ends(clean.input_ids, clean.answer_mask, self._special_ids)
        return Pair(record.id, digest, clean, null, turn_ends, images.digest, self._prefix(clean), images.files)

    def _read_images(self, record: Record) -> _Images:
        """Return the images of a record. Consecutive records with the same images share them, and the processor's outputs for them."""
        if not record.images or not _same(record.images, self._last.sources):
            try:
                images = self._shown(list(record.images))
            except ImageError as error:
                raise ImageError(f"record {record.id!r}: {error}") from error
            same = images.digest == self._last.digest
            self._last = replace(self._last, sources=images.sources, files=images.files) if same else images
        return self._last

    def _shown(self, sources: list[ImageSource]) -> _Images:
        files = file_states(sources)
        if self.stored_images is None:
            images = [read_image(image) for image in sources]
            return _Images(sources, images, "".join(map(pixel_digest, images)), files)
        stored = [self.stored_images[0](image) for image in sources]
        return _Images(sources, stored, "".join(image.key for image in stored), files)

    def shows_others(self, raw: Row, image_digest: str, files: str) -> bool:
        """Return whether other pixels lie under the image paths of a record by now.

        They are read only if a file has another size or time. A file that is gone is none with other pixels.

        Args:
            image_digest, files: the fields of the record's score.
        """
        try:
            sources = list(to_record(raw, self.image_folder).images) if files else []
            return file_states(sources) != files and digest(self._shown(sources).digest) != image_digest
        except (RecordError, ImageError):
            return False

    def has_images(self, raw: Row) -> bool:
        """Return whether a record has images and all of them can be read."""
        try:
            return bool(self._shown(list(to_record(raw, self.image_folder).images)).shown)
        except (RecordError, ImageError):
            return False

    def _null(self, record: Record, clean: Example, images: _Images) -> Example:
        if self.nulls.drops:
            return self._encode_without(record, clean)
        if self.nulls.hides:
            assert self.image_token_id is not None
            seen = clean.input_ids.ne(self.image_token_id).to(torch.int64)  # [T]
            return replace(clean, images={**clean.images, ATTENTION_MASK: seen})
        return self._encode_null(record, clean, images)

    def _encode_null(self, record: Record, clean: Example, images: _Images) -> Example:
        """Return the example with the same tokens and the null images."""
        if images.null is None:
            stored = self.stored_images
            nulls = [stored[1](image) for image in record.images] if stored else self.nulls(record.id, images.shown)
            null = encode_record(self.processor, record, max_length=self.max_length, images=nulls)
            assert torch.equal(clean.input_ids, null.input_ids), f"record {record.id!r}: the null image changed the tokens"
            alike = _alike(null.images, clean.images)  # these tensors depend on the tokens, so the next record has others
            images.null = {key: value for key, value in null.images.items() if key not in alike}
        return replace(clean, images={**clean.images, **images.null})

    def _encode_without(self, record: Record, clean: Example) -> Example:
        """Return the example of the conversation without the replaced images. Its answers are cut where the answers of `clean` are."""
        shorter = self.nulls.drop_from(record)
        example = encode_record(self._processor, shorter, max_length=self.max_length)
        places = example.answer_mask.nonzero().flatten()[: int(clean.answer_mask.sum())]  # [T]
        if not torch.equal(example.input_ids[places], clean.input_ids[clean.answer_mask]):
            raise RecordError(f"record {record.id!r}: its answers have other tokens when the image is dropped")
        return part(example, 0, int(places[-1]) + 1)

    def _prefix(self, example: Example) -> int:
        # With token types, all tokens before the answer see each other, so the image tokens depend on the question.
        if "token_type_ids" in example.images or example.answer_mask[: example.images_end + 1].any():
            return 0
        return example.images_end

    def fail(self, id: str, reason: str) -> None:
        reason = shortened(reason)
        if not self.quiet:
            logger.warning("record %s is not scored: %s", shortened(repr(id)), reason)
        self.failures[id] = reason


def file_states(sources: Sequence[ImageSource]) -> str:
    """Return size and time of change of each image's file, in nanoseconds: "311:1764467040000000000 ...". Images in memory have none."""
    states = (os.stat(source) for source in sources if isinstance(source, (str, os.PathLike)) and os.path.isfile(source))
    return " ".join(f"{state.st_size}:{state.st_mtime_ns}" for state in states)


def _same(images: Sequence[ImageSource], last: Sequence[ImageSource]) -> bool:
    """Return whether both lists hold the same files, or the same objects in memory. No image is decoded."""
    same = (a is b or (isinstance(a, str) and isinstance(b, str) and a == b) for a, b in zip(images, last, strict=False))
    return len(images) == len(last) and all(same)


def _alike(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that are equal in both under the same name."""
    return {key: value for key, value in left.items() if key in right and torch.equal(value, right[key])}


def _turn_ends(input_ids: Tensor, answer_mask: Tensor, special_ids: frozenset[int]) -> NDArray[np.int64]:
    """Return [E], the last special token of each answer span as an index into the answer tokens. A cut answer has no entry."""
    last: dict[int, int] = {}  # span -> index of its last special token so far
    for index, position in enumerate(answer_mask.nonzero().flatten().tolist()):
        if int(input_ids[position]) in special_ids:
            last[position - index] = index  # within a span, position - index is constant
    return np.array(list(last.values()), dtype=np.int64)  # [E]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset((added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id})


class RememberedImages:
    """RememberedImages wraps an image processor and remembers its last call, so that the same images are not prepared twice in a row."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self._images: list[Any] = []  # kept alive, because Python may give the identity of a deleted object to a new object
        self._options: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}

    def __call__(self, images: Any, **options: Any) -> BatchFeature:
        flat = list(_flat(images))
        same = len(flat) == len(self._images) and all(a is b for a, b in zip(flat, self._images, strict=True))
        if not same or options != self._options:
            self._images, self._options, self._outputs = flat, options, dict(self._image_processor(images, **options))
        return BatchFeature(dict(self._outputs))  # a new dict each time, because processors take entries out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flat(image)
    else:
        yield images
