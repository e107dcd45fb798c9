"""Saved folders name the classes that open them, so that a process can open them without importing this package first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from encoders.whole_files import write_bytes

CODE = Path(__file__).with_name("modeling_mof.py")
"""The file that transformers runs if a user sets `trust_remote_code=True`. Every saved folder has a copy."""

MODEL, PROCESSOR = f"{CODE.stem}.MoFForConditionalGeneration", f"{CODE.stem}.MoFProcessor"
AUTO_MAP = {
    "AutoConfig": f"{CODE.stem}.MoFConfig",
    "AutoModel": f"{CODE.stem}.MoFModel",
    "AutoModelForImageTextToText": MODEL,
    "AutoModelForMultimodalLM": MODEL,
    "AutoImageProcessor": f"{CODE.stem}.MoFImageProcessor",
    "AutoProcessor": PROCESSOR,
}
"""Auto class of transformers -> class that it takes from `CODE`."""


class OpenedByCode:
    """OpenedByCode is the base of the classes that transformers takes from `CODE`."""

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Do nothing for our own classes, because transformers would copy their source files into each folder that it saves later.

        Other classes that inherit from ours are registered as usual.
        """
        if cls.__module__.partition(".")[0] != __package__:
            super().register_for_auto_class(*args, **kwargs)  # type: ignore[misc]


class NamesCode(OpenedByCode):
    """NamesCode is the base of configuration and processors. Their JSON file names the classes, and a copy of `CODE` is beside it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        return super().to_dict() | {"auto_map": AUTO_MAP}  # type: ignore[misc]

    def to_json_file(self, json_file_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the JSON file, and `CODE` beside it."""
        super().to_json_file(json_file_path, *args, **kwargs)  # type: ignore[misc]
        write_bytes(Path(json_file_path).with_name(CODE.name), CODE.read_bytes())
