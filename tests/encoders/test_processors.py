"""`to_pixels` against the very processors that the encoders' own libraries use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm.data
import torch
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from encoders import read_image
from encoders.images.resizing import to_pixels

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Odd and even rests on both axes: (scaled - size) / 2 is k, k + 1/2 with k odd, and k + 1/2 with k even.
SIZES = [(97, 64), (64, 97), (61, 61), (200, 40), (30, 47), (123, 61), (20, 29)]


def photo(width: int, height: int) -> Image.Image:
    """Noise over structure: every shift by a pixel and every other filter shows."""
    rng = np.random.default_rng(width * height)
    blocks = np.kron(rng.integers(0, 256, (9, 9, 3)), np.ones((height // 9 + 1, width // 9 + 1, 1)))[:height, :width]
    return Image.fromarray((0.5 * blocks + rng.integers(0, 128, (height, width, 3))).astype(np.uint8))


def grey_levels(normalised: Tensor) -> Tensor:
    """[3, S, S] normalised -> 0..255"""
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    return (normalised * std + mean) * 255


def by_open_clip(size: int, mode: str, interpolation: str) -> Callable[[Image.Image], Tensor]:
    return open_clip.image_transform(size, is_train=False, mean=MEAN, std=STD, resize_mode=mode, interpolation=interpolation)


def by_timm(size: int, crop_pct: float, mode: str, interpolation: str) -> Callable[[Image.Image], Tensor]:
    return timm.data.create_transform((3, size, size), mean=MEAN, std=STD, crop_pct=crop_pct, crop_mode=mode, interpolation=interpolation)


def by_transformers(kind: type, **options) -> Callable[[Image.Image], Tensor]:
    processor = kind(image_mean=MEAN, image_std=STD, **options)
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


def square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


CASES = {
    "open_clip": (by_open_clip(28, "shortest", "bicubic"), partial(to_pixels, size=28, fit="crop")),
    "open_clip odd": (by_open_clip(21, "shortest", "bilinear"), partial(to_pixels, size=21, fit="crop", interpolation="bilinear")),
    "open_clip squash": (by_open_clip(28, "squash", "bicubic"), partial(to_pixels, size=28, fit="squash")),
    "timm": (by_timm(28, 0.875, "center", "bicubic"), partial(to_pixels, size=28, fit="crop", crop_pct=0.875)),
    "timm lanczos": (by_timm(28, 0.95, "center", "lanczos"), partial(to_pixels, size=28, fit="crop", crop_pct=0.95, interpolation="lanczos")),
    "timm squash": (by_timm(28, 0.9, "squash", "bicubic"), partial(to_pixels, size=28, fit="squash", crop_pct=0.9)),
    "transformers CLIP": (
        by_transformers(CLIPImageProcessorPil, size={"shortest_edge": 28}, crop_size=square(28)),
        partial(to_pixels, size=28, fit="crop", centre="floor"),
    ),
    "transformers DINOv2": (
        by_transformers(BitImageProcessorPil, size={"shortest_edge": 32}, crop_size=square(28)),
        partial(to_pixels, size=28, fit="crop", crop_pct=0.875, centre="floor"),
    ),
    "transformers SigLIP": (
        by_transformers(SiglipImageProcessorPil, size=square(28), resample=Image.Resampling.BICUBIC),
        partial(to_pixels, size=28, fit="squash"),
    ),
    "transformers LLaVA": (
        by_transformers(LlavaImageProcessorPil, size={"shortest_edge": 28}, crop_size=square(28), do_pad=True),
        partial(to_pixels, size=28, fit="pad", background=(122, 116, 104)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_processor(case: str, size: tuple[int, int]) -> None:
    theirs, ours = CASES[case]
    assert (grey_levels(theirs(photo(*size))) - ours(photo(*size))).abs().max() <= 1.01


@pytest.mark.data
def test_real_photos_are_those_of_the_processors(shared_data: Path) -> None:
    llava = by_transformers(LlavaImageProcessorPil, size={"shortest_edge": 336}, crop_size=square(336), do_pad=True)
    clip = by_transformers(CLIPImageProcessorPil, size={"shortest_edge": 224}, crop_size=square(224))
    dinov2 = by_timm(224, 0.875, "center", "bicubic")
    files = [file for folder in ("coco", "flickr8k", "photos") for file in sorted((shared_data / folder).rglob("*.jpg"))[::7][:4]]
    assert len(files) >= 10
    for file in files:
        image = read_image(file)
        assert (grey_levels(llava(image)) - to_pixels(image, 336, "pad", (122, 116, 104))).abs().max() <= 1.01
        assert (grey_levels(clip(image)) - to_pixels(image, 224, "crop", centre="floor")).abs().max() <= 1.01
        assert (grey_levels(dinov2(image)) - to_pixels(image, 224, "crop", crop_pct=0.875)).abs().max() <= 1.01
