"""The length of a record is estimated before it is tokenised, so that records of like length can share a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mof.data.records import RecordError, images_of, texts_of

TOKENS_OF_AN_IMAGE = 576  # in LLaVA-1.5; only the order of the lengths matters
CHARACTERS_OF_A_TOKEN = 4


def estimated_length(record: Any, key: str = "length") -> int:
    """Return the record's own number under `key`, or else an estimate of its tokens; 0 for a record in no known form."""
    if isinstance(record, Mapping) and isinstance(record.get(key), int):
        return record[key]
    try:
        texts = [text for role in ("system", "user", "assistant") for text in texts_of(record, role)]
    except RecordError:  # the collator reports it
        return 0
    return sum(map(len, texts)) // CHARACTERS_OF_A_TOKEN + TOKENS_OF_AN_IMAGE * len(images_of(record))
