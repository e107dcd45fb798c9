"""The records of a training, read and tried before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from mof.data.collator import SupervisedCollator
from mof.data.records import RecordError, to_record
from mof.data.rows import read_records

TRIED = 3  # records that are made a batch of
NAMED = 3  # problems in a message


def read_training_records(path: Path, processor: ProcessorMixin, image_folder: Path, max_length: int) -> list[dict[str, Any]]:
    """The raw records of a file, each with an answer and with images that exist.

    The longest are made a batch of: there a selection for another tokenizer or length, a chat template that does not say where
    answers are, or a `max_length` that leaves no room for an image shows now and not hours later.

    Raises:
        RecordError: naming the first records that cannot be used, with the reason, and how many there are.
        ValueError: for no records, no such folder, or a chat template that will not do.
    """
    if not image_folder.is_dir():
        raise ValueError(f"{image_folder} is no folder: --image-folder is what the records' image paths are relative to")
    raw = [record if isinstance(record, Mapping) else {"messages": record} for record in read_records(path)]
    if not raw:
        raise ValueError(f"{path} holds no records to train on")
    lengths, problems = [], []
    for record in raw:
        try:
            lengths.append(_check(record, image_folder))
        except RecordError as error:
            problems.append(str(error))
    if problems:
        raise RecordError(
            f"{path}: {len(problems)} of {len(raw)} records cannot be used; correct them or take them out: {'; '.join(problems[:NAMED])}"
        )
    longest = sorted(range(len(raw)), key=lambda index: lengths[index])[-TRIED:]
    collator = SupervisedCollator(processor, max_length, image_folder)
    collator([raw[index] for index in longest])
    if collator.left_out == len(longest):
        raise RecordError(f"{path}: none of the {len(longest)} longest records can be used; the warnings above say why")
    return [dict(record) for record in raw]


def _check(raw: Mapping[str, Any], image_folder: Path) -> int:
    """How many characters the record has. RecordError for one that cannot be trained on."""
    record = to_record(raw, image_folder)
    if not any(message["role"] == "assistant" for message in record.messages):
        raise RecordError(f"record {record.id!r}: no answer to learn from")
    return sum(len(part.get("text", "")) for message in record.messages for part in message["content"])
