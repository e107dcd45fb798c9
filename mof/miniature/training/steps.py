"""What the trainings share: learning rate, weight decay, log, weights on disk."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.005)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def save_half(model: nn.Module, path: Path) -> None:
    save_file({key: value.detach().half().contiguous() for key, value in model.state_dict().items()}, path)


class Log:
    """One line every hundred steps: losses, rate, time left. At the end a file for the card, in the network's folder."""

    def __init__(self, folder: Path, steps: int, batch: int) -> None:
        self.folder, self.steps, self.batch, self.start = folder, steps, batch, time.monotonic()
        self.done = 0

    def __call__(self, **losses: Tensor) -> None:
        self.done += 1
        if self.done % 100 == 0 or self.done == self.steps:
            each = (time.monotonic() - self.start) / self.done
            shown = "  ".join(f"{key} {value.item():.3f}" for key, value in losses.items())
            left = each * (self.steps - self.done) / 60
            print(
                f"{self.folder.name} {self.done}/{self.steps}  {shown}  {self.batch / each:.0f} samples/s  {left:.1f} min left", flush=True
            )
            if self.done == self.steps:
                facts = {"samples": self.steps * self.batch, "minutes": round(each * self.steps / 60, 1), "losses": shown}
                (self.folder / "training.json").write_text(json.dumps(facts))
