"""The folder of a run belongs to a single setting, and its finished stages are not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from encoders.runs import RunFile
from encoders.whole_files import remove_unfinished, write_json
from study.settings import renewed

FORMAT = 1
"""The version of everything in the folder."""
DONE = "stage.json"


class RunFolder:
    """RunFolder has a sub-folder for each stage. A stage is done when its `stage.json` exists; this file is written last.

    Args:
        path: the folder; it is made when the first file is written.
        identity: the setting and everything else in which this run differs from another run, JSON-able.
        resume: go on with what the folder holds.

    Raises:
        ValueError: for a folder that holds another run or other files, or this run without `resume`.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, resume: bool = False) -> None:
        self.folder = path
        file = RunFile(path / "run.json", "training run", FORMAT, "give another --output")
        if not file.path.is_file():
            file.refuse_foreign()
        else:
            _renew(file)
            file.claim(identity)
            if not resume:
                raise ValueError(f"{path} holds this run already; give --resume to go on with it, or another --output")
        PartialState().wait_for_everyone()  # no process writes before every process has looked
        if PartialState().is_main_process:
            remove_unfinished(path)
            file.claim(identity)
        PartialState().wait_for_everyone()

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str, otherwise: Any) -> Any:
        """Return the content that `write` wrote, in this run or in the run that is resumed."""
        return json.loads(self.path(name).read_text(encoding="utf-8")) if self.path(name).is_file() else otherwise

    def stage(self, name: str, work: Callable[[Path], dict[str, Any] | None]) -> dict[str, Any]:
        """Return the facts that `work(folder of the stage)` returned, now or in the run that is resumed."""
        folder, done = self.path(name), f"{name}/{DONE}"
        PartialState().wait_for_everyone()
        if not self.path(done).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            facts = work(folder) or {}
            PartialState().wait_for_everyone()
            self.write(done, facts)
        return self.read(done, {})

    def write(self, name: str, content: Any) -> None:
        """Write JSON whole or not at all. Only the main process writes; the others wait for it."""
        if PartialState().is_main_process:
            write_json(self.path(name), content)
        PartialState().wait_for_everyone()


def _renew(file: RunFile) -> None:
    """Bring the file of a run of an earlier version up to date: it holds the bare identity, or its setting lacks fields that came later."""
    try:
        content = json.loads(file.path.read_text(encoding="utf-8"))
        bare = isinstance(content, dict) and "identity" not in content and "setting" in content
        identity = content if bare else file.read()["identity"]
    except ValueError:
        return  # `claim` refuses a damaged file
    new = identity | {"setting": renewed(identity["setting"])} if isinstance(identity, dict) and "setting" in identity else identity
    if bare or json.dumps(new) != json.dumps(identity):
        file.write(new)
