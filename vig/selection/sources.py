"""The source of a record is the name under which a selection counts the record. A selection can keep a share of each source."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from mof.data.records import images_of
from mof.data.rows import RawRecord, rows_by_id

NO_SOURCE = "(none)"


def record_sources(records: Iterable[RawRecord], key: str = "source") -> dict[str, str]:
    """Return id -> source of every record: its value under `key`, or "(none)" where it has no value.

    With the key "image" the source is the top folder of the record's first image: "ocr_vqa" for "ocr_vqa/images/1.jpg". For
    absolute paths it is the first folder below the folder that all of them share.
    """
    if key != "image":
        return {id: _value(record, key) for id, record in rows_by_id(records)}
    paths = {id: _first_path(record) for id, record in rows_by_id(records)}
    absolute = {path.parent for path in paths.values() if path.is_absolute()}
    shared = PurePath(os.path.commonpath(absolute) if absolute else "/")
    return {id: _top_folder(path, shared) for id, path in paths.items()}


def sources_by_key(records: Iterable[RawRecord], key: str) -> dict[str, str]:
    """Return the sources as `record_sources` does, for a key that a user typed.

    Raises:
        ValueError: if no record has a value under the key.
    """
    sources = record_sources(records, key)
    if key != "image" and sources and set(sources.values()) == {NO_SOURCE}:
        raise ValueError(f"no record has a value under source_key={key!r}; give a key that names the source of a record, or 'image'")
    return sources


def _value(record: Any, key: str) -> str:
    value = record.get(key) if isinstance(record, Mapping) else None
    return NO_SOURCE if value is None else sys.intern(str(value))


def _first_path(record: Any) -> PurePath:
    """Return the path of the first image; an empty path for a record without an image, or with an image in memory."""
    first = next(iter(images_of(record)), None)
    if isinstance(first, Mapping):  # as Hugging Face data sets keep an image
        first = first.get("path")
    return PurePath(first) if isinstance(first, (str, os.PathLike)) else PurePath()


def _top_folder(path: PurePath, shared: PurePath) -> str:
    """Return the first folder of a relative path, or of an absolute path below `shared`; `shared` itself if there is none."""
    if path.is_absolute():
        return next(iter(path.parent.relative_to(shared).parts), shared.name) or NO_SOURCE
    return next(iter(path.parent.parts), NO_SOURCE)
