"""The records of a training run, read and checked before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mof.data.records import RecordError, to_record
from mof.data.rows import read_records
from mof.evals.mmvp import Question, read_mmvp
from study.data_mix import with_captions
from study.settings import Data


@dataclass(frozen=True)
class RunData:
    """Raw records with an id of their own each, and images as paths that exist."""

    align: list[dict[str, Any]]
    finetune: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    """Captions of photos that neither stage sees."""
    pairs: list[Question]
    """MMVP's questions about held-out scenes; only the miniature has them."""
    summary: str = ""
    """What the data mix replaced, where it did."""


def read_run_data(data: Data, data_dir: Path) -> RunData:
    """Read the setting's record files.

    Raises:
        RecordError: naming the first records that cannot be used, with the reason, and how many there are.
        ValueError: when `held_out` leaves fewer than two photos to measure on.
        OSError: for a missing file.
    """
    folders = [data_dir / folder for folder in data.image_folders]
    align, finetune, captions = (
        [record for file in files for record in read_records(data_dir / file)] for files in (data.align, data.finetune, data.captions)
    )
    summary = None
    if captions:
        finetune, summary = with_captions(finetune, captions)
    for records in (align, finetune):
        _check(records, folders)
    photos = sorted({image for record in align for image in _images(record)})
    held_out = set(_spaced(photos, data.held_out))
    if len(held_out) == 1:
        raise ValueError(f"held_out {data.held_out} of {len(photos)} images is a single one; two are needed, to show one for the other")
    return RunData(
        align=[record for record in align if held_out.isdisjoint(_images(record))],
        finetune=[record for record in finetune if held_out.isdisjoint(_images(record))],
        held_out=[record for record in align if not held_out.isdisjoint(_images(record))],
        pairs=read_mmvp(data_dir / "MMVP") if data.scenes else [],
        summary=str(summary or ""),
    )


def _check(records: list[dict[str, Any]], folders: Sequence[Path]) -> None:
    """Find the records' images, give every record a name of its own, and refuse what training would choke on hours later."""
    problems, seen = [], dict[str, int]()
    for record in records:
        try:
            if isinstance(record, dict):
                _find_images(record, folders)
            checked = to_record(record)
            if not any(message["role"] == "assistant" for message in checked.messages):
                raise RecordError(f"record {checked.id!r}: no answer to learn from")
        except RecordError as error:
            problems.append(str(error))
            continue
        name = checked.id  # LLaVA's mix uses an image's id for several records; scores need one name each
        seen[name] = seen.get(name, 0) + 1
        record["id"] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    if problems:
        raise RecordError(f"{len(problems)} of {len(records)} records cannot be used: " + "; ".join(problems[:3]))


def _find_images(record: dict[str, Any], folders: Sequence[Path]) -> None:
    """Replace the record's images by their paths in the first folder that has them."""
    for key in ("image", "images"):
        given = record.get(key)
        if not given:  # absent, null, "" or []
            continue
        found = [_find(record, image, folders) for image in (given if isinstance(given, list) else [given])]
        record[key] = found if isinstance(given, list) else found[0]


def _find(record: dict[str, Any], image: Any, folders: Sequence[Path]) -> str:
    path = next((folder / str(image) for folder in folders if (folder / str(image)).is_file()), None)
    if path is None:
        raise RecordError(
            f"record {record.get('id')!r}: image {image!r} is in none of {', '.join(map(str, folders))}; "
            "give --data_dir, or correct image_folders in the config"
        )
    return str(path)


def _images(record: dict[str, Any]) -> list[str]:
    images = record.get("images") or record.get("image") or []
    return images if isinstance(images, list) else [images]


def _spaced(names: Sequence[str], share: float) -> list[str]:
    """`share` of the names, evenly spaced, the first among them."""
    return [name for i, name in enumerate(names) if math.floor(i * share) > math.floor((i - 1) * share)]
