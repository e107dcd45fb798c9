"""The three networks share this training loop (AdamW, a warm-up and a cosine, a log) and the form of their weights on disk."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WARMUP = 100  # steps

logger = logging.getLogger(__name__)


class Log:
    """Log logs the losses, the speed and the time left, once in a hundred steps. The last step writes a file for the network's card."""

    def __init__(self, folder: Path, steps: int, batch: int) -> None:
        self.folder, self.steps, self.batch, self.start = folder, steps, batch, time.monotonic()
        self.done = 0

    def __call__(self, losses: dict[str, Tensor]) -> None:
        """Count a step."""
        self.done += 1
        if self.done % 100 and self.done != self.steps:
            return
        each = (time.monotonic() - self.start) / self.done  # seconds
        shown = "  ".join(f"{key} {value.item():.3f}" for key, value in losses.items())
        speed, left = self.batch / each, each * (self.steps - self.done) / 60
        logger.info("%s %d/%d  %s  %.0f samples/s  %.1f min left", self.folder.name, self.done, self.steps, shown, speed, left)
        if self.done == self.steps:
            facts = {"samples": self.steps * self.batch, "minutes": round(each * self.steps / 60, 1), "losses": shown}
            (self.folder / "training.json").write_text(json.dumps(facts))


def fit(
    model: nn.Module,
    draw_losses: Callable[[], dict[str, Tensor]],
    *,
    steps: int,
    rate: float,
    decay: float,
    log: Log,
    largest_gradient: float = math.inf,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train `model` on the sum of the losses that `draw_losses` returns for a new batch.

    Args:
        rate: the highest learning rate.
        decay: the weight decay of matrices; vectors have none.
        largest_gradient: longer gradients are scaled down to this norm.
        after_step: called with the number of each step, from 0.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / max(steps, 1))) + 0.005)
    )
    for step in range(steps):
        losses = draw_losses()
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, largest_gradient)
        optimizer.step()
        schedule.step()
        after_step(step)
        log(losses)


def save_half(model: nn.Module, path: Path) -> None:
    """Write the weights in half precision."""
    save_file({key: value.detach().half().contiguous() for key, value in model.state_dict().items()}, path)
