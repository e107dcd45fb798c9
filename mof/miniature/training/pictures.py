"""This module draws pictures to train on, and augments them by cropping, light and noise."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mof.miniature.scenes import SIZE, Scene, render, sample_burst, sample_scene

BURST = 4  # pictures in a burst

logger = logging.getLogger(__name__)


def picture_pool(count: int, seed: int) -> tuple[Tensor, list[Scene]]:
    """Return scenes of the training world, every value equally likely, as pixels (uint8 [count, 3, 40, 40]) and as scenes."""
    logger.info("drawing %d scenes", count)
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    pictures = [np.asarray(render(scene, rng)) for scene in scenes]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), scenes


def burst_pool(count: int, drawings: int, seed: int) -> Tensor:
    """Return bursts in one or more drawings, uint8 [count, drawings, BURST, 3, 40, 40].

    The pictures of a burst share background and place, and differ in one thing; its drawings differ in background and place.
    """
    logger.info("drawing %d bursts", count)
    rng = np.random.default_rng(seed)
    pool = torch.empty(count, drawings, BURST, 3, SIZE, SIZE, dtype=torch.uint8)
    for i in range(count):
        scenes = sample_burst(rng, BURST)
        for drawing in range(drawings):
            again = rng.integers(2**31)
            pictures = np.stack([np.asarray(render(scene, np.random.default_rng(again))) for scene in scenes])
            pool[i, drawing] = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    return pool


def view(pixels: Tensor, smallest: float) -> Tensor:
    """Return random crops with at least the share `smallest` of the area, resized to the old size, never mirrored or turned."""
    side = torch.empty(len(pixels)).uniform_(smallest, 1).sqrt()
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side, side
    theta[:, :, 2] = (torch.rand(len(pixels), 2) * 2 - 1) * (1 - side)[:, None]
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def light(pixels: Tensor) -> Tensor:
    """Return the pictures [B, 3, H, W] in other light and noise."""
    gain = torch.empty(len(pixels), 3, 1, 1).uniform_(0.85, 1.15) * torch.empty(len(pixels), 1, 1, 1).uniform_(0.75, 1.25)
    return (pixels * gain + torch.randn_like(pixels) * 5).clamp(0, 255)


def normalised(pixels: Tensor) -> Tensor:
    """Return pixels in 0..255 as the networks take them."""
    return (pixels / 255 - 0.5) / 0.25
