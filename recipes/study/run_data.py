"""read_run_data reads and checks the records of a training run before anything is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoders.images.opening import inside
from mof.data.digests import record_id
from mof.data.forms import to_mapping
from mof.data.records import RecordError, images_of, to_record
from mof.data.rows import read_records, rows
from mof.evals.mmvp import Question, read_mmvp
from study.data_mix import with_captions
from study.settings import Data


@dataclass(frozen=True)
class RunData:
    """RunData holds raw records, each with an id that no other record has, and with its images under "images", as paths that exist."""

    align: list[dict[str, Any]]
    finetune: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    """Captions of photos that neither stage sees."""
    pairs: list[Question]
    """MMVP's questions about held-out scenes; only the miniature has them."""
    mix: dict[str, int]
    """Counts of `study.data_mix.with_captions`; empty without captions."""
    truth: dict[str, dict[str, Any]] = field(default_factory=dict)
    """id -> the noise of the stage 2 record and the truth about its answers. Only the miniature knows it, and only controls use it."""


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
    finetune, mix = with_captions(finetune, captions) if captions else (finetune, {})
    align, finetune = (_checked(records, folders) for records in (align, finetune))
    photos = sorted({image for record in align for image in record["images"]})
    held_out = set(spaced(photos, data.held_out))
    if len(held_out) == 1:
        raise ValueError(
            f"held_out {data.held_out} of {len(photos)} images is a single image; two are needed, to show each in place of the other"
        )
    return RunData(
        align=[record for record in align if held_out.isdisjoint(record["images"])],
        finetune=[record for record in finetune if held_out.isdisjoint(record["images"])],
        held_out=[record for record in align if not held_out.isdisjoint(record["images"])],
        pairs=read_mmvp(data_dir / "MMVP") if data.scenes else [],
        mix=mix,
        truth=read_truth(data_dir / data.finetune[0]) if data.scenes else {},
    )


def read_truth(records: Path) -> dict[str, dict[str, Any]]:
    """Return the truth that `mof.miniature.write_dataset` drew with a file of records, by the records' ids."""
    return json.loads(records.with_name(f"{records.stem}-truth.json").read_text(encoding="utf-8"))


def _checked(records: Sequence[Any], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the records with paths of their images and without equal ids. Refuse records that would end training hours later."""
    checked, problems = [], []
    for raw in rows(records):  # it numbers equal ids, which scores could not tell apart
        try:
            record = _with_paths(raw, folders)
            parsed = to_record(record)
            if not any(message["role"] == "assistant" for message in parsed.messages):
                raise RecordError(f"record {parsed.id!r}: no answer to learn from")
        except RecordError as error:
            problems.append(str(error))
            continue
        record["id"] = parsed.id
        checked.append(record)
    if problems:
        raise RecordError(f"{len(problems)} of {len(records)} records cannot be used: " + "; ".join(problems[:3]))
    return checked


def _with_paths(raw: Any, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the record with each of its images as an absolute path, in the first folder that has the image."""
    if not isinstance(raw, (dict, list)):
        raise RecordError(f"record {record_id(raw)!r}: expected a dict, got {raw!r}")
    paths = []
    for image in images_of(raw):
        places = (Path(inside(folder, str(image))).absolute() for folder in folders)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise RecordError(
                f"record {record_id(raw)!r}: image {image!r} is in none of {', '.join(map(str, folders))}; "
                "give --data-dir, or correct image_folders in the config"
            )
        paths.append(str(path))
    return {key: value for key, value in to_mapping(raw).items() if key != "image"} | {"images": paths}


def one_per_image(groups: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return the groups with only the first record of each image."""
    first = {images_of(record)[0]: i for i, record in reversed(list(enumerate(groups["matching"])))}
    return {name: [records[i] for i in sorted(first.values())] for name, records in groups.items()}


def spaced(names: Sequence[str], share: float) -> list[str]:
    """Return `share` of the names, evenly spaced, the first name among them."""
    return [name for i, name in enumerate(names) if math.floor(i * share) > math.floor((i - 1) * share)]
