"""The card of a selected data set is a small JSON file beside the records. It says how they were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encoders.digests import file_digest
from encoders.runs import versions
from encoders.saved_folders import card_path
from encoders.whole_files import write_sealed
from vig.selection.selected import Selection


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
