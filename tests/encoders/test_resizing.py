"""The compiled resize against Pillow's own, pixel by pixel, over every shape, fit and filter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from encoders.images.resizing import _compiled_resize, compiled_resize, to_pixels

pytestmark = pytest.mark.skipif(compiled_resize() is None, reason="needs numba")

FITS = st.sampled_from(["pad", "crop", "squash"])
FILTERS = st.sampled_from(["bicubic", "bilinear", "lanczos"])
SIDES = st.one_of(st.integers(1, 90), st.integers(1, 400))


def extreme(width: int, height: int, seed: int = 0) -> Image.Image:
    """0 and 255 at random: filters overshoot at every edge, so that whatever is cut to 0..255 shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255)


def by_pillow(*args, **options) -> torch.Tensor:
    """Pixels as without numba."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("encoders.images.resizing.compiled_resize", lambda: None)
        return to_pixels(*args, **options)


@given(
    width=SIDES,
    height=SIDES,
    size=st.integers(1, 60),
    fit=FITS,
    interpolation=FILTERS,
    crop_pct=st.sampled_from([1.0, 0.95, 0.9, 0.875, 0.3]),
    centre=st.sampled_from(["round", "floor"]),
    background=st.tuples(*[st.integers(0, 255)] * 3),
)
@settings(max_examples=300, deadline=None)
def test_every_pixel_is_pillows(width, height, size, fit, interpolation, crop_pct, centre, background) -> None:
    image, crop_pct = extreme(width, height), 1.0 if fit == "pad" else crop_pct
    options = {"interpolation": interpolation, "crop_pct": crop_pct, "centre": centre}
    assert torch.equal(to_pixels(image, size, fit, background, **options), by_pillow(image, size, fit, background, **options))


@pytest.mark.parametrize("shape", [(3000, 2), (2, 3000), (2500, 1900), (1900, 2500), (1, 1)])
@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
def test_long_and_large_images_are_pillows(shape: tuple[int, int], fit: str) -> None:
    image = extreme(*shape)  # of the large ones Pillow keeps the memory in pieces
    assert torch.equal(to_pixels(image, 224, fit), by_pillow(image, 224, fit))  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (60, 200), (31, 57)])
def test_squash_is_one_call_of_pillow(width: int, height: int) -> None:
    """Which axis Pillow resizes first depends on its version and on the shape."""
    image = extreme(width, height)
    for size in (20, 56, 77):
        expected = pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))
        assert torch.equal(to_pixels(image, size, "squash"), expected)


def test_pillow_alone_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOF_PIXELS", "pillow")
    assert _compiled_resize.__wrapped__() is None
