"""Pictures of noise, and the bytes of files that hold pictures."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Return a picture in which each colour of each pixel is drawn. `size` is (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of the image's file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tar_of(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """Write a tar with members of these names and contents, and return its path."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
