"""All HTML pages have the same style. Each page is a single file that loads nothing else.

The package lies in `encoders` because `mof` and `vig` both write pages, and `encoders` is the only package that both may import.
`style.css` holds the colours, light and dark, and the style of all pages; `encoders.pages.charts` draws the charts.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from numpy.typing import NDArray

from encoders.whole_files import write_whole


def render(template: Path, **values: Any) -> str:
    """Return the text of a page.

    Args:
        template: a jinja template. It has `{% include "style.css" %}` in its style element and the filters `count`, `percent`
            and `signed`. Values are escaped, except `markupsafe.Markup`.
    """
    return _open(template).render(values)


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Write the page that `render` returns piece by piece, because a page may have tens of megabytes."""
    page = _open(template).stream(values)
    write_whole(path, lambda temporary: page.dump(str(temporary), encoding="utf-8"))


def data_uri(content: bytes, kind: str) -> str:
    """Return an image file as an address that holds it. `kind` is "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def signed(value: float | None) -> str:
    """Return the number with three decimals and its sign (a minus as wide as a plus), or a dash for None."""
    return "\u2013" if value is None else f"{value:+.3f}".replace("-", "\u2212")


def colour_scale(values: Sequence[float] | NDArray[np.floating]) -> float:
    """Return the nats that get the full colour: 2 % of the values lie beyond."""
    return max(0.1, round(float(np.quantile(np.abs(values), 0.98)), 1)) if len(values) else 0.1


def _open(template: Path) -> Template:
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": "{:,}".format, "percent": "{:.1%}".format, "signed": signed}
    return environment.get_template(template.name)
