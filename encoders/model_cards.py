"""The card of a model is README.md in its folder, which the Hugging Face hub shows.

Each part of the library writes a section of its own, so that a card which somebody has written or completed keeps everything else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from encoders.whole_files import write_bytes

CARD = "README.md"
HEAD = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["mof-vig"]}
"""The metadata of a new card, for models of other libraries; our models have a card from the first `save_pretrained`."""
_BEGIN, _END = "<!-- mof-vig: {} -->", "<!-- mof-vig: end -->"


def write_section(folder: str | os.PathLike[str], title: str, facts: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Write a section into the folder's card, in the place of an earlier section with this title, or at the end.

    Args:
        facts: name -> value, the rows of a table.
        head: the metadata (`huggingface_hub.ModelCardData`) of a new card. A card that is there keeps its own.
    """
    path = Path(folder) / CARD
    begin = _BEGIN.format(title)
    rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in facts.items())
    section = f"{begin}\n## {title}\n\n| | |\n| --- | --- |\n{rows}{_END}\n"
    text = path.read_bytes().decode(errors="surrogateescape") if path.is_file() else _new_card(head)
    earlier = re.compile(f"{re.escape(begin)}\n.*?{re.escape(_END)}\n?", re.DOTALL)
    text = earlier.sub(lambda _: section, text, count=1) if earlier.search(text) else f"{text.rstrip()}\n\n{section}"
    write_bytes(path, text.encode(errors="surrogateescape"))


def _new_card(head: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData  # slow to import

    return f"---\n{ModelCardData(**head).to_yaml()}\n---\n"


def _cell(value: Any) -> str:
    """Return the value as text that Markdown shows as it is, in one line."""
    text = escape(" ".join(str(value).split()))
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
