"""Canvas collects the shapes of a drawing and writes them as SVG, once in light colours and once in dark colours."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

COLOURS = {  # encoders as in the gallery, VIG as in the report
    "light": {"ink": "#1f2328", "soft": "#59636e", "line": "#8c959f", "paper": "#ffffff", "panel": "#f1f3f5", "clip": "#c9600c",
              "dino": "#0e7c86", "helped": "64, 122, 230", "misled": "221, 130, 60"},
    "dark": {"ink": "#e6edf3", "soft": "#a3adb8", "line": "#77818c", "paper": "#0d1117", "panel": "#1c232b", "clip": "#f29a4c",
             "dino": "#45c8d0", "helped": "84, 140, 255", "misled": "222, 128, 56"},
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"


@dataclass
class Canvas:
    """A canvas has a size in pixels, a description for screen readers, and shapes with the names of colours in braces."""

    width: int
    height: int
    says: str
    shapes: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, fill: str = "none", line: str = "none", **more: float | str) -> None:
        """Draw a rectangle. `more` are attributes of SVG, with _ in place of -."""
        self._add("rect", {"x": x, "y": y, "width": width, "height": height, "fill": fill, "stroke": line, **more})

    def line(self, *points: tuple[float, float], colour: str = "{line}", arrow: bool = False, **more: float | str) -> None:
        """Draw a line through points, with an arrow at its end or without."""
        end: dict[str, float | str] = {"marker_end": "url(#tip)"} if arrow else {}
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._add("polyline", {"points": path, "fill": "none", "stroke": colour, "stroke-width": 2, **end, **more})

    def text(self, x: float, y: float, words: str, size: float = 18, colour: str = "{ink}", anchor: str = "start", **more: str) -> None:
        """Write a line of text whose baseline starts (or is centred, or ends) at x, y."""
        attributes: dict[str, float | str] = {"x": x, "y": y, "font-size": size, "fill": colour, "text-anchor": anchor, **more}
        self._add("text", attributes, escape(words).replace("{", "{{").replace("}", "}}"))

    def image(self, x: float, y: float, side: float, address: str) -> None:
        """Show a small picture, with hard edges between its pixels."""
        self._add("image", {"x": x, "y": y, "width": side, "height": side, "href": address, "style": "image-rendering: pixelated"})

    def write(self, stem: Path) -> None:
        """Write `stem-light.svg` and `stem-dark.svg`."""
        for theme, colours in COLOURS.items():
            body = "\n".join(self.shapes).format(**colours)
            tip = f'<path d="M0,0 L8,4 L0,8 z" fill="{colours["line"]}"/>'
            stem.with_name(f"{stem.name}-{theme}.svg").write_text(
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
                f'height="{self.height}" font-family="{FONT}" role="img">\n<title>{escape(self.says)}</title>\n'
                f'<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto" '
                f'markerUnits="userSpaceOnUse">{tip}</marker></defs>\n{body}\n</svg>\n'
            )

    def _add(self, tag: str, attributes: dict[str, float | str], content: str = "") -> None:
        values = {name: f"{value:g}" if isinstance(value, int | float) else value for name, value in attributes.items()}
        written = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in values.items())
        self.shapes.append(f"<{tag} {written}>{content}</{tag}>" if content else f"<{tag} {written}/>")
