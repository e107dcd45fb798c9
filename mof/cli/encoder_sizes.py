"""Encoders are measured without their weights. `python -m mof.cli.encoder_sizes` writes encoder_sizes.json for the presets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from encoders import build_encoder
from encoders.presets import PRESETS


class Unfilled(TorchFunctionMode):
    """Unfilled skips the filling of tensors without storage, which takes most of the time of building a network on the meta device."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        fills = name.endswith("_") and not name.startswith("_") and name != "requires_grad_"
        if fills and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return function(*args, **(kwargs or {}))


def measure(name: str) -> tuple[int, int, int, int, float, bool]:
    """Return the sizes of an encoder (`mof.cli.encoder_table.Sizes`), for the layer that it gives by default and its native image size."""
    with torch.device("meta"), Unfilled():
        encoder = build_encoder(name, pretrained=False)
    millions = round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6, 1)
    return encoder.width, encoder.patch_size, encoder.image_size, encoder.grid[0] * encoder.grid[1], millions, encoder.has_text


if __name__ == "__main__":
    rows = (f"{json.dumps(name)}: {json.dumps(measure(name))}" for name in sorted(PRESETS))
    Path(__file__).with_suffix(".json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
