"""Which fine-tuning a folder holds: the same command goes on with it or finds it done, another one is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encoders.runs import LOCKS, TEMPORARY, RunLock, write_whole
from vig.scoring.identity import differences

RECORD, CHECKPOINTS = "training.json", "checkpoints"


def claim(folder: Path, identity: Mapping[str, Any], lock: RunLock) -> None:
    """Make `folder` that of the run with this identity (JSON-able), or go on with it, under a lock in its folder of checkpoints.

    A run that left no checkpoint, such as one whose settings were refused, gives way to any other.

    Raises:
        ValueError: for a folder that holds another run, saying what differs, or other files, or in which a run is alive.
    """
    identity = json.loads(json.dumps(identity, default=str))
    new = not (folder / RECORD).is_file()
    files = [path for path in folder.rglob("*") if path.is_file()] if new else ()
    if not all(path.name.startswith(TEMPORARY) or path.match(f"{CHECKPOINTS}/{LOCKS}") for path in files):
        raise ValueError(f"{folder} is not empty and holds no training; give a new --output-dir")
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    lock.take()
    if new:
        _write(folder, {"identity": identity, "result": None})
        return
    found = json.loads((folder / RECORD).read_text())
    different = list(differences(found["identity"], identity))
    if different and not found["result"] and not any(folder.glob(f"{CHECKPOINTS}/checkpoint-*")):
        _write(folder, {"identity": identity, "result": None})
    elif different:
        raise ValueError(
            f"{folder} holds another training; give the same command to go on with it, or a new --output-dir. Different: "
            + "; ".join(different)
        )


def result(folder: Path) -> dict[str, Any] | None:
    """What `finish` was given, or None for a run that is not done."""
    return json.loads((folder / RECORD).read_text())["result"]


def finish(folder: Path, facts: Mapping[str, Any]) -> None:
    """Mark the run as done; the last thing that it writes."""
    _write(folder, {**json.loads((folder / RECORD).read_text()), "result": facts})


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    write_whole(folder / RECORD, lambda path: path.write_text(json.dumps(content, indent=1)))
