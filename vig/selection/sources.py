"""Where records come from: the name under which a selection counts them, and keeps a share of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from mof.data.rows import RawRecord, id_of, rows

NO_SOURCE = "(none)"


def record_sources(records: Iterable[RawRecord], key: str = "source") -> dict[str, str]:
    """id -> source of every record: what it holds under `key`, "(none)" where it holds nothing.

    With the key "image" it is the top folder of the record's (first) image: "ocr_vqa" for "ocr_vqa/images/1.jpg".
    """
    return {id_of(record): _source(record, key) for record in rows(records)}


def _source(record: Any, key: str) -> str:
    if not isinstance(record, Mapping):
        return NO_SOURCE
    value = record.get(key)
    if key == "image":
        images = record.get("images") or value
        first = images[0] if isinstance(images, (list, tuple)) and images else images
        folders = PurePath(first).parts[:-1] if isinstance(first, (str, PurePath)) else ()
        value = folders[0] if folders else None
    return NO_SOURCE if value is None else str(value)
