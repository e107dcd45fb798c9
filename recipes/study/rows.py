"""The lines of a run's table: which encoders, how fused, and which tokens stage 2 is trained on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from encoders import build_encoder
from mof.adapter import SSL_RATIOS
from study.settings import Setting

KEEPS = (0.3, 0.5, 0.7, 0.9)
"""Shares of the samples (or tokens) that the study of selections keeps."""
WAYS = {
    "vig": "the samples that the image helped most, and in them the tokens that it helped (the paper)",
    "vig-samples": "these samples whole",
    "vig-tokens": "the tokens that the image helped most, of all samples",
    "random": "as many samples and tokens as `vig` has, drawn at random",
    "random-samples": "whole samples drawn at random, with as many tokens as `vig-samples` has",
}
"""How stage 2's tokens are chosen."""


@dataclass(frozen=True)
class Row:
    """One line of the final table."""

    name: str
    encoders: tuple[str, ...]
    fusion: str
    options: tuple[tuple[str, Any], ...] = ()
    selection: str | None = None
    """One of `WAYS`; None: every answer token."""
    keep: float | None = None
    """Share for the selection; None: the setting's."""
    misled: bool = False
    """Whether to ask the model questions after false statements, too."""
    like: str | None = None
    """The row that it shares stage 1 with; None: it has one of its own."""

    @property
    def aligned(self) -> str:
        """Name of the stage 1 that this row starts from."""
        return self.like or self.name

    def selected(self, way: str, keep: float | None = None) -> Row:
        """The same encoders, stage 2 on a selection."""
        name = f"{self.name}+{way}" if keep is None else f"{way} {keep:g}"
        return dataclasses.replace(self, name=name, selection=way, keep=keep, like=self.name)


def table_rows(setting: Setting) -> list[Row]:
    """The rows of a plain run: the first encoder alone, all of them fused, the same with VIG."""
    names = tuple(setting.encoders)
    fused = Row(setting.fusion, names, setting.fusion)
    return [Row(names[0], names[:1], setting.fusion), fused, fused.selected("vig")]


def fusion_rows(setting: Setting) -> list[Row]:
    """The rows of --compare fusion. The first encoder twice, interleaved, costs as many visual tokens as two encoders.

    Raises:
        ValueError: for a setting without two encoders of one width, which the additive rows need, or without pairs.
    """
    names = tuple(setting.encoders)
    with torch.device("meta"):  # widths without weights
        widths = {name: build_encoder(**spec, pretrained=False).width for name, spec in setting.encoders.items()}
    if len(widths) != 2 or len(set(widths.values())) > 1 or not setting.data.scenes:
        raise ValueError(f"--compare fusion needs two encoders of one width and held-out pairs (data: scenes); {setting.name} has {widths}")
    rows = [Row(name, (name,), "interleaved") for name in names]
    rows.append(Row(f"{names[0]}x2", (names[0], names[0]), "interleaved"))
    for ratio in SSL_RATIOS[1:-1]:
        rows.append(Row(f"additive {ratio:g}", names, "additive", (("weights", {names[0]: 1 - ratio, names[1]: ratio}),)))
    rows.append(Row("concat", names, "concat"))
    fused = Row("interleaved", names, "interleaved")
    return [*rows, fused, fused.selected("random"), fused.selected("vig")]


def selection_rows(setting: Setting) -> list[Row]:
    """The rows of --compare selection: everything, then every way to select at every share.

    Raises:
        ValueError: for a setting without held-out pairs.
    """
    if not setting.data.scenes:
        raise ValueError(f"--compare selection needs held-out pairs (data: scenes), which {setting.name} has not")
    fused = Row(setting.fusion, tuple(setting.encoders), setting.fusion, misled=True)
    return [fused, *(fused.selected(way, keep) for keep in KEEPS for way in WAYS)]


COMPARISONS = {"fusion": fusion_rows, "selection": selection_rows}
