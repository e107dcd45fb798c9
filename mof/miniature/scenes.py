"""The miniature world consists of small images that vary along the nine MMVP patterns (pure numpy and PIL, seeded).

A scene has an object, one to three balls, and perhaps a sign with a letter, on a cluttered ground. The fields of `Scene` are the facts
about which questions are asked. `render` draws everything else at random (background, clutter, exact place, shade, noise).
"""

import hashlib
import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 40  # pixels per side
_SUPER = 3  # images are drawn larger by this factor, then averaged down

KINDS = ("fish", "key", "rocket", "mushroom", "hammer", "tree", "heart", "bell")
COLOURS = {
    "red": (215, 45, 40), "green": (50, 165, 60), "blue": (50, 80, 220),
    "yellow": (235, 215, 50), "purple": (150, 60, 180), "orange": (240, 140, 35),
}  # fmt: skip
VALUES: dict[str, tuple] = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "direction": ("left", "right", "up", "down"),
    "dot": (True, False),
    "state": ("whole", "broken"),
    "count": (1, 2, 3),
    "side": ("left", "right", "top", "bottom"),
    "surface": ("plain", "striped"),
    "letter": ("T", "X", "O", "L", None),
    "view": ("level", "above"),
}
# MMVP's nine patterns, spelled as in its `Type` column -> the field of a scene that the pattern varies.
PATTERNS = {
    "Orientation": "direction",
    "Presence": "dot",
    "State": "state",
    "Quantity": "count",
    "Spatial": "side",
    "Color": "colour",
    "Structural Character": "surface",
    "Text": "letter",
    "Camera Perspective": "view",
}


@dataclass(frozen=True)
class Scene:
    """A scene holds the facts of an image. `VALUES` lists the values of each field."""

    kind: str
    colour: str
    direction: str
    dot: bool
    state: str
    count: int
    side: str
    surface: str
    letter: str | None
    view: str

    def held_out(self) -> bool:
        """Return True for a fixed tenth of all scenes, which no training (of encoders, LLM or adapters) ever shows."""
        return hashlib.blake2b(repr(tuple(vars(self).values())).encode()).digest()[0] % 10 == 0


def habit(kind: str, field: str) -> object:
    """Return the value of `field` that is usual for this kind of object, which a language model can guess without looking."""
    values = [value for value in VALUES[field] if value is not None]
    return values[zlib.crc32(f"{kind}/{field}".encode()) % len(values)]


def sample_scene(rng: np.random.Generator, *, habit_share: float = 0.0, held_out: bool = False) -> Scene:
    """Return a random scene. With probability `habit_share`, a field has the usual value of its kind, otherwise a random value."""
    while True:
        kind = KINDS[rng.integers(len(KINDS))]
        fields = {
            field: habit(kind, field) if rng.random() < habit_share else values[rng.integers(len(values))]
            for field, values in VALUES.items()
            if field != "kind"
        }
        scene = Scene(kind=kind, **fields)  # type: ignore[arg-type]
        if scene.held_out() == held_out:
            return scene


def sample_pair(rng: np.random.Generator, pattern: str) -> tuple[Scene, Scene]:
    """Return two held-out scenes that differ only in the field that `pattern` names."""
    field = PATTERNS[pattern]
    while True:
        first = sample_scene(rng, held_out=True)
        others = [value for value in VALUES[field] if value not in (None, getattr(first, field))]
        second = replace(first, **{field: others[rng.integers(len(others))]})
        if second.held_out() and getattr(first, field) is not None:
            return first, second


def sample_burst(rng: np.random.Generator, length: int) -> list[Scene]:
    """Return a training scene and scenes that differ from it in a single field, like photos taken in quick succession."""
    first = sample_scene(rng)
    burst = [first]
    while len(burst) < length:
        field = list(VALUES)[rng.integers(len(VALUES))]
        other = replace(first, **{field: VALUES[field][rng.integers(len(VALUES[field]))]})
        if other not in burst and not other.held_out():
            burst.append(other)
    return burst


# --- drawing. Shapes are outlines in a unit square, pointing right (+x); y grows downwards.
def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0) -> list[tuple[float, float]]:
    angles = np.radians(np.linspace(start, end, 24))
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


SHAPES: dict[str, list[list[tuple[float, float]]]] = {
    "fish": [_ellipse(0.25, 0, 0.75, 0.55), [(-0.3, 0), (-1, -0.65), (-1, 0.65)]],
    "key": [_ellipse(-0.55, 0, 0.45, 0.5), _box(-0.3, -0.15, 1, 0.15), _box(0.45, 0, 0.62, 0.5), _box(0.8, 0, 1, 0.5)],
    "rocket": [_box(-0.6, -0.3, 0.45, 0.3), [(0.4, -0.32), (1, 0), (0.4, 0.32)], [(-0.2, 0), (-1, -0.75), (-1, 0.75)]],
    "mushroom": [_ellipse(0.1, 0, 0.9, 0.95, -90, 90), _box(-1, -0.28, 0.2, 0.28)],
    "hammer": [_box(-1, -0.15, 0.6, 0.15), _box(0.4, -0.75, 1, 0.75)],
    "tree": [[(-0.5, -0.8), (1, 0), (-0.5, 0.8)], _box(-1, -0.2, -0.4, 0.2)],
    "heart": [_ellipse(0.45, -0.4, 0.5, 0.48), _ellipse(0.45, 0.4, 0.5, 0.48), [(0.5, -0.85), (0.5, 0.85), (-1, 0)]],
    "bell": [_ellipse(-0.2, 0, 0.8, 0.6, 90, 270) + [(0.45, -0.75), (0.45, 0.75)], _box(0.35, -0.95, 0.65, 0.95), _ellipse(0.78, 0, 0.22, 0.22)],
}  # fmt: skip
_ANGLE = {"right": 0, "down": 90, "left": 180, "up": 270}
_SIDE = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
_STROKES = {
    "T": [[(-1, -1), (1, -1)], [(0, -1), (0, 1)]],
    "X": [[(-1, -1), (1, 1)], [(-1, 1), (1, -1)]],
    "O": [_ellipse(0, 0, 0.9, 1)],
    "L": [[(-0.8, -1), (-0.8, 1)], [(-0.8, 1), (1, 1)]],
}


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Return an RGB image of the scene of SIZE x SIZE pixels, with a random background, place, shade and noise."""
    canvas = _background(scene.view, rng)
    draw = ImageDraw.Draw(canvas)
    away = np.array(_SIDE[scene.side], dtype=float)
    centre = (np.array([SIZE / 2, SIZE / 2]) - 4 * away + rng.uniform(-2, 2, 2)) * _SUPER
    radius = rng.uniform(8.5, 10.5) * _SUPER
    _draw_object(canvas, scene, centre, radius, rng)
    _draw_balls(draw, scene.count, centre, away, radius, rng)
    if scene.letter is not None:
        _draw_sign(draw, scene.letter, away, rng)
    pixels = np.asarray(canvas.reduce(_SUPER), dtype=np.float32)
    pixels = pixels * rng.uniform(0.85, 1.12) + rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _background(view: str, rng: np.random.Generator) -> Image.Image:
    """Return the ground with clutter in random colours, and with a sky if the camera is level."""
    side, base = SIZE * _SUPER, rng.integers(80, 170)

    def shade(spread: int, lighter: int = 0) -> tuple[int, ...]:
        return tuple(int(c) for c in base + lighter + rng.integers(-spread, spread + 1, 3))

    canvas = Image.new("RGB", (side, side), shade(25))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 6)):
        x, y = rng.integers(0, side, 2)
        dx, dy = rng.integers(-15, 16, 2)
        draw.line([(x, y), (x + dx, y + dy)], fill=shade(40), width=int(rng.integers(2, 5)))
    if view == "level":
        horizon = int(rng.uniform(0.2, 0.45) * side)
        draw.rectangle([0, 0, side, horizon], fill=shade(25, lighter=60))
    return canvas


def _draw_object(canvas: Image.Image, scene: Scene, centre: np.ndarray, radius: float, rng: np.random.Generator) -> None:
    angle = math.radians(_ANGLE[scene.direction] + rng.uniform(-12, 12))
    axis, across = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])

    def place(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [tuple(centre + radius * (x * axis + y * across)) for x, y in points]

    mask = Image.new("L", canvas.size)
    draw = ImageDraw.Draw(mask)
    for outline in SHAPES[scene.kind]:
        draw.polygon(place(outline), fill=255)
    if scene.state == "broken":  # a zigzag crack across the whole object
        draw.line(place([(-0.25, -1.1), (0.15, -0.35), (-0.25, 0.35), (0.15, 1.1)]), fill=0, width=round(3 * _SUPER))
    colour = (np.array(COLOURS[scene.colour]) * rng.uniform(0.85, 1.1) + rng.normal(0, 8, 3)).clip(0, 255)
    paint = Image.new("RGB", canvas.size, tuple(int(c) for c in colour))
    if scene.surface == "striped":
        stripes = ImageDraw.Draw(paint)
        for offset in np.arange(-1.2, 1.3, 0.5):
            stripes.line(place([(offset, -1.2), (offset, 1.2)]), fill=tuple(int(c * 0.3) for c in colour), width=round(1.9 * _SUPER))
    canvas.paste(paint, mask=mask)
    if scene.dot:
        x, y = centre + radius * 0.45 * axis
        r = 3 * _SUPER
        ImageDraw.Draw(canvas).ellipse([x - r, y - r, x + r, y + r], fill=(255, 255, 255), outline=(20, 20, 20), width=2)


def _draw_balls(
    draw: ImageDraw.ImageDraw, count: int, centre: np.ndarray, away: np.ndarray, radius: float, rng: np.random.Generator
) -> None:
    """Draw a row of balls beside the object. The row is at right angles to the line from the object to its middle."""
    middle = centre + away * (radius + rng.uniform(4.5, 6) * _SUPER)
    across = np.array([-away[1], away[0]])
    shade = int(rng.integers(0, 60))
    for i in range(count):
        x, y = middle + across * (i - (count - 1) / 2) * 6.5 * _SUPER
        r = 2.3 * _SUPER
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(shade, shade, shade), outline=(235, 235, 235), width=2)


def _draw_sign(draw: ImageDraw.ImageDraw, letter: str, away: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a white board with the letter, in a corner away from the balls."""
    corners = [np.array(c) for c in ((6, 6), (SIZE - 6, 6), (6, SIZE - 6), (SIZE - 6, SIZE - 6))]
    corners = [c for c in corners if np.dot(c - SIZE / 2, away) < 0]
    x, y = (corners[rng.integers(len(corners))] + rng.uniform(-0.7, 0.7, 2)) * _SUPER
    half = 5.2 * _SUPER
    draw.rectangle([x - half, y - half, x + half, y + half], fill=(250, 250, 250), outline=(30, 30, 30), width=2)
    for stroke in _STROKES[letter]:
        draw.line([(x + 0.6 * half * u, y + 0.6 * half * v) for u, v in stroke], fill=(20, 20, 20), width=round(1.6 * _SUPER))
