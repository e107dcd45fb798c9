"""Files damaged at random: an image or an ImageError, never anything else, and the same with and without the fast decoder."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.pictures import encoded

from encoders import ImageError, read_image


def encode(format: str, mode: str = "RGB", **options) -> bytes:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return encoded(small.resize((40, 30), Image.Resampling.BICUBIC).convert(mode), format, **options)


HEALTHY = {
    "jpeg": encode("JPEG"),
    "progressive jpeg": encode("JPEG", progressive=True),
    "grey jpeg": encode("JPEG", "L"),
    "cmyk jpeg": encode("JPEG", "CMYK"),
    "jpeg with restart markers": encode("JPEG", restart_marker_rows=1),
    "png": encode("PNG"),
    "palette png": encode("PNG", "P"),
    "rgba png": encode("PNG", "RGBA"),
    "gif": encode("GIF", "P"),
    "webp": encode("WEBP"),
    "tiff": encode("TIFF", compression="tiff_lzw"),
    "bmp": encode("BMP"),
}


def read(content: bytes) -> np.ndarray | None:
    """The pixels, or None for an ImageError, which must name the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own remarks about odd metadata
        try:
            image = read_image(content, name="shards/17.tar/0042.img")
        except ImageError as error:
            assert "shards/17.tar/0042.img" in str(error)
            return None
    assert image.mode == "RGB"
    return np.asarray(image)


def read_by_pillow(content: bytes) -> np.ndarray | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("encoders.images.reading._simplejpeg", lambda: None)
        return read(content)


def assert_same(content: bytes) -> None:
    got, expected = read(content), read_by_pillow(content)
    assert (got is None) == (expected is None)
    assert got is None or np.array_equal(got, expected)


@pytest.mark.parametrize("kind", HEALTHY)
def test_the_healthy_file_is_read(kind: str) -> None:
    assert read(HEALTHY[kind]) is not None


@given(kind=st.sampled_from(sorted(HEALTHY)), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=8))
@settings(max_examples=400, deadline=5000)
def test_flipped_bytes(kind: str, flips: list[tuple[float, int]]) -> None:
    content = bytearray(HEALTHY[kind])
    for place, change in flips:
        content[round(place * (len(content) - 1))] ^= change
    assert_same(bytes(content))


@given(kind=st.sampled_from(sorted(HEALTHY)), start=st.floats(0, 1), length=st.integers(1, 200), put=st.binary(max_size=20))
@settings(max_examples=300, deadline=5000)
def test_replaced_pieces(kind: str, start: float, length: int, put: bytes) -> None:
    content, place = HEALTHY[kind], round(start * len(HEALTHY[kind]))
    assert_same(content[:place] + put + content[place + length :])


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "png"])
def test_cut_anywhere_is_an_error(kind: str) -> None:
    content = HEALTHY[kind]
    whole = read(content)
    for end in range(len(content) - 1):
        got = read(content[:end])
        assert got is None or np.array_equal(got, whole), end  # all pixels may be there, and only the end mark missing
        assert got is None or end > len(content) - 24, end


@given(content=st.binary(max_size=300))
@settings(max_examples=100, deadline=5000)
def test_any_bytes(content: bytes) -> None:
    for magic in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"II*\0"):
        read(magic + content)


@pytest.mark.data
def test_real_photos_cut_or_damaged_in_their_pixels(shared_data: Path) -> None:
    rng = np.random.default_rng(0)
    for file in sorted(shared_data.rglob("*.jpg"))[::60]:
        content = file.read_bytes()
        assert read(content) is not None
        assert read(content[: len(content) // 2]) is None
        damaged = bytearray(content)
        damaged[len(content) * 3 // 4 + int(rng.integers(50))] ^= int(rng.integers(1, 256))
        assert_same(bytes(damaged))
