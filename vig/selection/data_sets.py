"""A selection from a data set of Hugging Face is a data set again, so that its rows are not held in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from mof.data.digests import SCORED, SELECTED, digest
from mof.data.rows import id_of, rows


def is_data_set(records: Any, kind: str) -> bool:
    """Return whether the records are a "Dataset" or an "IterableDataset" of Hugging Face, which need not be installed."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(records, getattr(datasets, kind))


def with_numbered_ids(data_set: Any) -> Any:
    """Return the data set with ids that are numbered as in `mof.data.rows.rows`, if texts in its column "id" repeat."""
    ids = data_set["id"][:] if "id" in data_set.column_names else []
    numbered = [id_of(row) for row in rows([{"id": id} for id in ids if isinstance(id, str) and id])]
    if len(numbered) < len(ids) or numbered == ids:
        return data_set
    return data_set.remove_columns("id").add_column("id", numbered)


def with_entries(data_set: Any, kept: Iterable[tuple[int, Mapping[str, Any], dict[str, Any]]]) -> Any:
    """Return the kept rows of a data set with their new entries as columns, in place of earlier ones.

    Args:
        kept: place, record and new entries of each kept row.
    """
    places, columns = [], dict[str, list[Any]]()
    without_ids = "id" not in data_set.column_names
    for place, record, entries in kept:
        places.append(place)
        if without_ids and "id" in record and SCORED in entries:  # a row that occurs several times has no number in the data set
            entries[SCORED] = digest({name: value for name, value in record.items() if name != "id"})
        for name, value in entries.items():
            columns.setdefault(name, [None] * len(data_set))[place] = value
    data_set = data_set.remove_columns([name for name in SELECTED if name in data_set.column_names])
    for name, values in columns.items():
        data_set = data_set.add_column(name, values)
    return data_set.select(places)
