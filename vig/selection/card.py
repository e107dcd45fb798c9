"""Beside selected records lie their card, which says how they were chosen, and their index, which names their rows for other programs."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from encoders.digests import file_digest
from encoders.runs import versions
from encoders.saved_folders import card_path
from encoders.tables import write_table
from encoders.whole_files import write_sealed
from vig.selection.selected import Selection


class Index(NamedTuple):
    """An index names the selected records, in their order."""

    rows: array[int]
    """Their places in the file that they were selected from, counted from 0."""
    ids: list[str]


def index_path(output: Path) -> Path:
    """Return the path of the index of selected records: selected.rows.parquet beside selected.json."""
    return output.with_name(f"{output.stem}.rows.parquet")


def write_index(output: Path, index: Index) -> None:
    """Write the index of the records in `output`: a table with the columns "row" and "id"."""
    write_table(index_path(output), pa.table({"row": pa.array(index.rows, pa.int64()), "id": pa.array(index.ids, pa.string())}))


def write_card(output: Path, selection: Selection, settings: Mapping[str, Any], records: int) -> None:
    """Write the card of the records in `output`.

    Args:
        settings: the options of the selection, as they were given.
        records: number of records in the file, text-only records among them.
    """
    manifest, summary = selection.scores.manifest, selection.summary()
    identity, digest = manifest["identity"], file_digest(output)
    content = {
        "data": {"file": output.name, "records": records, "xxh3": digest},
        "files": {output.name: digest},  # it is compared when the records are read
        "model": {"name": manifest.get("about", {}).get("model"), "class": identity.get("model"), "weights": identity.get("weights")},
        "null": identity.get("null"),
        "measure": selection.by,
        "threshold": selection.threshold,
        "settings": dict(settings),
        "counts": {**asdict(summary), "sparsity": summary.sparsity},
        "calibration": manifest.get("calibration", {}),
        "versions": versions("mof-vig"),
    }
    write_sealed(card_path(output), content)
