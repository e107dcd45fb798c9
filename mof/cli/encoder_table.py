"""The table of `mof encode --list`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode

from encoders import available_encoders, build_encoder
from encoders.presets import PRESETS

COLUMNS = ("name", "width", "patch", "pixels", "tokens", "params (M)", "text", "licence of the weights")


class Unfilled(TorchFunctionMode):
    """Skips the filling of tensors without storage, which takes most of the time of building a network on the meta device."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        fills = name.endswith("_") and not name.startswith("_") and name != "requires_grad_"
        if fills and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return function(*args, **(kwargs or {}))


def print_encoders() -> None:
    """Print what is known of each encoder without its weights: of the layer that it gives by default, at its native size."""
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for column in table.columns[1:6]:
        column.justify = "right"
    logging.disable(logging.WARNING)  # open_clip warns that weights are random, which is what is wanted here
    for name in track(available_encoders(), "building", console=Console(stderr=True), transient=True):
        table.add_row(name, *_row(name))
    logging.disable(logging.NOTSET)
    Console(width=120).print(table)


def _row(name: str) -> list[str]:
    """What the table says of one encoder; why not, for one of another package that cannot be built."""
    try:
        with torch.device("meta"), Unfilled():  # sizes without weights
            encoder = build_encoder(name, pretrained=False)
    except Exception as error:
        if name in PRESETS:
            raise
        return ["-"] * 6 + [f"cannot be built: {error}"]
    parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    sizes = (encoder.width, encoder.patch_size, encoder.image_size, encoder.grid[0] * encoder.grid[1], f"{parameters:.1f}")
    licence = PRESETS[name].licence if name in PRESETS else "see its package"
    return [*map(str, sizes), "yes" if encoder.has_text else "no", licence]
