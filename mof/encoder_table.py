"""The table of `mof encode --list`."""

from __future__ import annotations

import logging

import torch
from rich.console import Console
from rich.table import Table

from encoders import available_encoders, build_encoder
from encoders.presets import PRESETS, WEIGHTS


def print_encoders() -> None:
    """Print what is known of each encoder without its weights."""
    table = Table("name", "backend:model", "image size", "patch", "width", "tokens", box=None)
    logging.disable(logging.WARNING)  # open_clip warns that weights are random, which is what is wanted here
    for name in available_encoders():
        with torch.device("meta"):  # sizes without weights
            encoder = build_encoder(name, pretrained=False)
        model = PRESETS[name].model.replace(str(WEIGHTS), "encoders/weights") if name in PRESETS else "registered"
        sizes = (encoder.image_size, encoder.patch_size, encoder.width, encoder.grid[0] * encoder.grid[1])
        table.add_row(name, model, *map(str, sizes))
    logging.disable(logging.NOTSET)
    Console(width=120).print(table)
