"""Console prints tables and lines on a terminal without the control characters that names and answers may hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from encoders.terminal import plain


class Console(RichConsole):
    """Console is rich's Console, except that texts stay as they are: "[/INST]" or ":x:" is no markup.

    Control characters are written out, as in `encoders.terminal.plain`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable. Orders of rich itself, for example to move the cursor, stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)
