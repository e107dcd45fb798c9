"""Records in, pairs of examples out: each record tokenised once with its images and once with their null images."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from encoders.images import ImageError, read_image
from mof.records import RecordError, digest, record_id, to_record
from mof.supervision import Example, encode_record
from vig.nulls import NullImages

# Shapes: L = tokens of a record, T = answer tokens among them, E = end-of-turn tokens among those.

logger = logging.getLogger(__name__)

RawRecord = Mapping[str, Any]  # as `mof.records.to_record` reads it


@dataclass(frozen=True, slots=True)
class Pair:
    """One record in both branches; the token ids are the same."""

    id: str
    digest: str
    clean: Example
    null: Example
    turn_ends: NDArray[np.int64]
    """[E] indices into the answer tokens."""


@dataclass
class PairReader:
    """Reads records into pairs and keeps account of those that give none."""

    processor: ProcessorMixin
    image_folder: str | os.PathLike[str] | None
    nulls: NullImages
    max_length: int
    text_only: list[str] = field(default_factory=list)
    """Ids of records without an image that can be trained on."""
    failures: dict[str, str] = field(default_factory=dict)
    """id -> reason."""

    def __post_init__(self) -> None:
        self._special_ids = _special_ids(self.processor.tokenizer)

    def read(self, raw: RawRecord) -> Pair | None:
        """None for a record without an image, and for one that cannot be read or has no answer."""
        id = record_id(raw)
        try:
            record = to_record(raw, self.image_folder)
            images = [read_image(image) for image in record.images]
            clean = encode_record(self.processor, record, max_length=self.max_length, images=images)
        except (RecordError, ImageError) as error:
            self.fail(id, str(error))
            return None
        if not clean.answer_mask.any():
            self.fail(id, f"no answer token within max_length={self.max_length}")
            return None
        if not record.images:  # only now: training takes text-only records unscored, so they must have passed the checks
            self.text_only.append(id)
            return None
        null = encode_record(self.processor, record, max_length=self.max_length, images=self.nulls(id, images))
        assert torch.equal(clean.input_ids, null.input_ids), f"record {id!r}: the null image changed the tokens"
        return Pair(id, digest(raw), clean, null, _turn_ends(clean.input_ids, clean.answer_mask, self._special_ids))

    def fail(self, id: str, reason: str) -> None:
        logger.warning("record %r is not scored: %s", id, reason)
        self.failures[id] = reason


def unique_ids(records: Sequence[RawRecord]) -> list[str]:
    """The ids of all records. ValueError naming those used twice: scores and selections refer to records by id."""
    ids = [record_id(record) for record in records]
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"record ids must be unique; {len(twice)} used more than once: {', '.join(twice[:10])}")
    return ids


def _turn_ends(input_ids: Tensor, answer_mask: Tensor, special_ids: frozenset[int]) -> NDArray[np.int64]:
    """The last special token of each answer span, as an index into the answer tokens; a cut answer has none."""
    last: dict[int, int] = {}  # span -> index of its last special token so far
    for index, position in enumerate(answer_mask.nonzero().flatten().tolist()):
        if int(input_ids[position]) in special_ids:
            last[position - index] = index  # within one span, position - index is constant
    return np.array(list(last.values()), dtype=np.int64)  # [E]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset((added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id})
