"""Notebooks show the HTML that `_repr_html_` returns. It has the style of the pages, and changes nothing else in the notebook."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from encoders.pages import render
from encoders.pages.thumbnails import thumbnail_uri

SIDE = 160  # pixels of a thumbnail, at most
LONGEST = 80
"""Characters of a name that are shown. The end of a longer name is shown, because a path says most there."""


def notebook_html(template: Path, **values: Any) -> str:
    """Return the text of a template whose rules of style hold only inside of it.

    Args:
        template: as for `encoders.pages.render`. It begins with its only style element.
    """
    style, body = render(template, **values).removeprefix("<style>").split("</style>", 1)
    nested = re.sub(r"(?<![\w.-])(:root|body) (?={)", "& ", style)
    return f'<div class="mof-vig" style="margin: 0; padding: 8px 12px"><style>.mof-vig {{{nested}}}</style>{body}</div>'


def notebook_table(title: str, rows: Iterable[Sequence[Any]], header: Sequence[str] = (), note: str = "") -> str:
    """Return a table. Its cells are texts, numbers and results of `picture`."""
    shown = [[shortened(cell) if type(cell) is str else cell for cell in row] for row in rows]
    return notebook_html(Path(__file__).with_name("table.html.jinja"), title=title, rows=shown, header=header, note=note)


def picture(image: Image.Image, name: str) -> Markup:
    """Return a small copy of the image; its tip is the name."""
    return Markup('<img src="{}" alt="{}" title="{}">').format(thumbnail_uri(image, SIDE), shortened(name), shortened(name))


def shortened(name: str) -> str:
    """Return the name, or the end of a name that is longer than `LONGEST`."""
    return name if len(name) <= LONGEST else "\N{HORIZONTAL ELLIPSIS}" + name[-LONGEST:]
