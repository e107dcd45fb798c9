"""A row of a run says which encoders are fused in which way, and which tokens stage 2 is trained on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from encoders import build_encoder
from mof.adapter import FUSIONS, SSL_RATIOS
from study.settings import Setting
from study.ways import KEEPS, NOISE, NOISE_WAYS, WAYS


@dataclass(frozen=True)
class Row:
    """Row says what is trained for a row of the final table."""

    name: str
    encoders: tuple[str, ...]
    fusion: str
    options: tuple[tuple[str, Any], ...] = ()
    selection: str | None = None
    """A way in `study.ways.WAYS` or `NOISE_WAYS`; None selects every answer token."""
    keep: float | None = None
    """The share that the selection keeps; None keeps the share in the setting."""
    heeds: bool = False
    """Whether the selection takes whole samples where the paper's rule warns (the setting's `heed_warning`)."""
    misled: bool = False
    """Whether the model is also asked questions after false statements."""
    noise: str | None = None
    """The noise in stage 2, a name in `study.ways.NOISE`; None is the noise in the setting."""
    worth: bool = False
    """Whether the worth of each encoder is measured, too. That asks the questions five more times."""
    stored: bool = False
    """Whether the features of the setting's encoders are read from a store, which all such rows share."""
    like: str | None = None
    """The row whose stage 1 this row uses; None: this row has its own stage 1."""
    layer: int | tuple[int, ...] | None = None
    """The layers of the encoders that this row reads; None reads the layers in the setting."""

    @property
    def aligned(self) -> str:
        """Return the name of the stage 1 that this row starts from."""
        return self.like or self.name

    @property
    def mix(self) -> str:
        """Return the name of the record file of stage 2, where scenes are drawn."""
        return "finetune" if self.noise is None else f"finetune-{self.noise}"

    def selected(self, way: str, keep: float | None = None) -> Row:
        """Return the row with the same encoders and stage 1, and stage 2 on a selection."""
        name = f"{self.name}+{way}" if keep is None else f"{way} {keep:g}"
        return dataclasses.replace(self, name=name, selection=way, keep=keep, like=self.name)


def table_rows(setting: Setting) -> list[Row]:
    """Return the rows of a plain run: the first encoder alone, all encoders fused, all fused with VIG.

    The miniature also has as many tokens at random, and questions after false statements.
    """
    names, drawn = tuple(setting.encoders), setting.data.scenes is not None
    fused = Row(setting.fusion, names, setting.fusion, heeds=setting.heed_warning, misled=drawn)
    control = [fused.selected("random")] if drawn else []
    return [Row(names[0], names[:1], setting.fusion, misled=drawn), fused, *control, fused.selected("vig")]


def fusion_rows(setting: Setting) -> list[Row]:
    """Return the rows of --compare fusion, all on records without noise.

    Every fusion has a row. A fusion that merges both encoders in each position also has a row with a grid twice as long, "-equal", so
    that it has as many visual tokens as two encoders side by side. The controls are each encoder alone and the first encoder twice.

    Raises:
        ValueError: for a setting without two encoders of the same width, which the additive rows need, or without pairs.
    """
    names = tuple(setting.encoders)
    with torch.device("meta"):  # sizes without weights
        encoders = [build_encoder(**spec, pretrained=False) for spec in setting.encoders.values()]
    widths = {name: encoder.width for name, encoder in zip(names, encoders, strict=True)}
    if len(widths) != 2 or len(set(widths.values())) > 1 or not setting.data.scenes:
        raise ValueError(
            f"--compare fusion needs two encoders of the same width and held-out pairs (data: scenes); {setting.name} has {widths}"
        )
    rows, columns = setting.grid or encoders[0].grid
    fused = [Row(fusion, names, fusion, worth=True) for fusion in FUSIONS]
    longer = (("grid", (2 * rows, columns)),)
    equal = [Row(f"{fusion}-equal", names, fusion, longer) for fusion, mixer in FUSIONS.items() if not mixer.side_by_side]
    additive = [
        Row(f"additive-{share:g}", names, "additive", (("weights", {names[0]: 1 - share, names[1]: share}),))
        for share in SSL_RATIOS[1:-1]
        if share != 0.5  # the row "additive"
    ]
    alone = [Row(name, (name,), "interleaved") for name in names]
    twice = Row(f"{names[0]}x2", (names[0], names[0]), "interleaved")
    whole = setting.max_tiles == 1  # a store holds no tiles
    stored = [dataclasses.replace(row, stored=whole) for row in (*fused, *equal, *additive)]
    return [dataclasses.replace(row, noise="0") for row in (*stored, *alone, twice)]


def layer_rows(setting: Setting) -> list[Row]:
    """Return the rows of --compare layers, all of the first encoder alone, on records without noise.

    A row reads each layer alone. Two more rows read all layers: their channels side by side ("joined"), and added with learnt weights
    ("weighed").

    Raises:
        ValueError: for a setting without pairs, or an encoder whose layers lie on different grids.
    """
    name, spec = next(iter(setting.encoders.items()))
    if not setting.data.scenes:
        raise ValueError(f"--compare layers needs held-out pairs (data: scenes); {setting.name} has none")
    with torch.device("meta"):  # sizes without weights
        every = tuple(range(1, build_encoder(**spec | {"layer": -1}, pretrained=False).blocks + 1))
        build_encoder(**spec | {"layer": every}, pretrained=False)
    alone = [Row(f"{name}-{layer}", (name,), "interleaved", layer=layer) for layer in every]
    joined = Row(f"{name}-joined", (name,), "interleaved", layer=every)
    weighed = dataclasses.replace(joined, name=f"{name}-weighed", options=(("weigh_layers", True),))
    return [dataclasses.replace(row, noise="0") for row in (*alone, joined, weighed)]


def selection_rows(setting: Setting) -> list[Row]:
    """Return the rows of --compare selection: everything, then every way to select at every share.

    Raises:
        ValueError: for a setting without held-out pairs.
    """
    fused = _fused(setting, "selection")
    return [fused, *(fused.selected(way, keep) for keep in KEEPS for way in WAYS)]


def noise_rows(setting: Setting) -> list[Row]:
    """Return the rows of --compare noise: every way to select with every noise, all from one stage 1.

    Raises:
        ValueError: for a setting without held-out pairs.
    """
    fused = _fused(setting, "noise")
    return [
        dataclasses.replace(fused, name=f"{way} {noise}", selection=way, noise=noise, like=fused.name)
        for noise in NOISE
        for way in NOISE_WAYS
    ]


def _fused(setting: Setting, study: str) -> Row:
    if not setting.data.scenes:
        raise ValueError(f"--compare {study} needs held-out pairs (data: scenes); {setting.name} has none")
    return Row(setting.fusion, tuple(setting.encoders), setting.fusion, misled=True)


COMPARISONS = {"fusion": fusion_rows, "layers": layer_rows, "selection": selection_rows, "noise": noise_rows}
