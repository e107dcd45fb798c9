"""The folder of a run: it belongs to one setting, and its finished stages are not done again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

IDENTITY = "run.json"
DONE = "stage.json"


class RunFolder:
    """A folder with one sub-folder per stage. A stage is done when its `stage.json` exists; that is written last.

    Args:
        path: the folder; made if need be.
        identity: what makes this run this run, JSON-able.
        resume: go on with what the folder holds.

    Raises:
        ValueError: for a folder that holds another run, or this one without `resume`.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, resume: bool = False) -> None:
        self.folder = path
        identity = json.loads(json.dumps(identity))
        held = path / IDENTITY
        if held.is_file():
            other = json.loads(held.read_text())
            if different := sorted(_differences(identity, other)):
                raise ValueError(f"{path} holds another run, which differs in {', '.join(different)}; give another --output_dir")
            if not resume:
                raise ValueError(f"{path} holds this run already; give --resume to go on with it, or another --output_dir")
        elif path.is_dir() and any(path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no run; give an --output_dir that is new or empty")
        PartialState().wait_for_everyone()  # nobody writes before everybody has looked
        self.write(IDENTITY, identity)

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str, otherwise: Any) -> Any:
        """What `write` wrote, in this run or in the one that is resumed."""
        return json.loads(self.path(name).read_text()) if self.path(name).is_file() else otherwise

    def stage(self, name: str, work: Callable[[Path], dict[str, Any] | None]) -> dict[str, Any]:
        """The facts that `work(folder of the stage)` returned, now or in the run that is resumed."""
        folder, done = self.path(name), self.path(name) / DONE
        PartialState().wait_for_everyone()
        if not done.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            facts = work(folder) or {}
            PartialState().wait_for_everyone()
            self.write(f"{name}/{DONE}", facts)
        return json.loads(done.read_text())

    def write(self, name: str, content: Any) -> None:
        """Write JSON whole or not at all; on the main process only, which the others wait for."""
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            target = self.path(name)
            temporary = target.with_name(f".{target.name}.part")
            temporary.write_text(json.dumps(content, indent=1))
            os.replace(temporary, target)
        PartialState().wait_for_everyone()


def _differences(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, as dotted names."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [at]
    keys = ours.keys() | theirs.keys()
    return [name for key in keys for name in _differences(ours.get(key), theirs.get(key), f"{at}.{key}".lstrip("."))]
