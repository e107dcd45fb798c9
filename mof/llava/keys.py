"""A layout is a table of the names that a published checkpoint gives to the parts of a multimodal model. It is read in both directions.

The released MoF code saved its stage-1 file by the substring `mm_projector`, which also matches `dino_mm_projector`. Its loader cut both
down to the same names, so that the last projector silently replaced the first. Files with these names are refused here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from encoders.names import first_names
from encoders.weight_files import WeightsError

LANGUAGE_MODEL = "language model"
CLIP, DINO = "clip", "dinov2"  # names of the encoders, in the order of fusion
UNUSED = "unused"


def projector(encoder: str) -> str:
    """Return the name of the part that is an encoder's adapter."""
    return f"{encoder} projector"


def tower(encoder: str) -> str:
    """Return the name of the part that is the encoder itself."""
    return f"{encoder} tower"


@dataclass(frozen=True)
class Layout:
    """A layout holds the names of the weights in a kind of checkpoint."""

    name: str
    encoders: tuple[str, ...]
    prefixes: tuple[tuple[str, str, str], ...]
    """(prefix in the file, part, prefix in the part). The first entry that fits is taken, so longer prefixes come first."""

    def sort(self, weights: Mapping[str, Tensor], source: Path) -> Parts:
        """Return the weights of the checkpoint `source` by part.

        Raises:
            WeightsError: for keys that belong to no part, and for two keys of the same weight; the message names them.
        """
        parts, stray = Parts(self, source, len(weights)), []
        names: dict[tuple[str, str], str] = {}
        for key, value in weights.items():
            prefix, part, own_prefix = next((rule for rule in self.prefixes if key.startswith(rule[0])), ("", "", ""))
            if key.endswith(RECOMPUTED) or part == UNUSED:
                parts.unused.append(key)
            elif not part:
                stray.append(key)
            else:
                own = own_prefix + key.removeprefix(prefix)
                if (other := names.setdefault((part, own), key)) != key:
                    raise WeightsError(f"{source} gives the same weight twice, as {other} and as {key}. {COLLISION}")
                parts.tensors[part][own] = value
        if stray:
            raise WeightsError(
                f"{source} is no checkpoint in the layout {self.name}: {len(stray)} unexpected: {first_names(sorted(stray))}"
            )
        return parts

    def key(self, part: str, own: str) -> str:
        """Return the name that this layout gives to the weight `own` of a part."""
        prefix, _, own_prefix = next(rule for rule in self.prefixes if rule[1] == part and own.startswith(rule[2]))
        return prefix + own.removeprefix(own_prefix)


@dataclass
class Parts:
    """Parts holds the weights of a checkpoint, by part."""

    layout: Layout
    source: Path
    count: int
    """Number of tensors in the checkpoint."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    """Part -> name in the part -> weight; empty for a part that the checkpoint does not hold."""
    unused: list[str] = field(default_factory=list)
    """Keys of the tensors that no model uses."""

    def place(self, part: str) -> str:
        """Return a text for messages that names the place of a part."""
        prefix = next(rule[0] for rule in self.layout.prefixes if rule[1] == part)
        return f"{self.source} ({prefix}*)"


RECOMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Buffers that older versions of transformers saved; they are computed from the config."""

LLAVA = Layout(
    "llava",
    (CLIP,),
    (
        ("model.mm_projector.", projector(CLIP), ""),
        ("model.vision_tower.vision_tower.", tower(CLIP), ""),
        ("", LANGUAGE_MODEL, ""),
    ),
)
MOF = Layout(
    "released-mof",
    (CLIP, DINO),
    (
        ("model.dino_mm_projector.", projector(DINO), ""),
        ("model.dino_tower.vision_tower.", tower(DINO), ""),
        ("model.dino_tower.clip_vision_tower.", UNUSED, ""),  # the released code used this CLIP only for its dtype
        *LLAVA.prefixes,
    ),
)
HF_LLAVA = Layout(
    "hf-llava",
    (CLIP,),
    (  # the names in files of transformers; below, the names of its modules
        ("multi_modal_projector.linear_1.", projector(CLIP), "0."),
        ("multi_modal_projector.linear_2.", projector(CLIP), "2."),
        ("vision_tower.", tower(CLIP), ""),
        ("language_model.", LANGUAGE_MODEL, ""),
        ("model.multi_modal_projector.linear_1.", projector(CLIP), "0."),
        ("model.multi_modal_projector.linear_2.", projector(CLIP), "2."),
        ("model.vision_tower.", tower(CLIP), ""),
        ("model.language_model.", LANGUAGE_MODEL, "model."),
        ("lm_head.", LANGUAGE_MODEL, "lm_head."),
    ),
)

COLLISION = (
    "The released MoF code saved stage-1 files by the substring 'mm_projector', which also matches 'dino_mm_projector', and its "
    "loader cut both down to the same names ('0.weight', ...), so that the last one silently won. Give the file with the full "
    "names, model.mm_projector.* and model.dino_mm_projector.*"
)


def with_full_names(state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Return the projectors of a stage-1 file or of LLaVA's non_lora_trainables.bin, under their names in a whole checkpoint.

    Raises:
        WeightsError: for a name that does not tell the projector's encoder, two names of the same weight, or a weight that belongs
            to no projector.
    """
    names: dict[str, str] = {}
    for key in state:
        name = key.removeprefix("base_model.model.")  # the prefix of a model that peft has wrapped
        if name[:1].isdigit() or name in ("weight", "bias"):
            raise WeightsError(f"{source}: {key} does not say which projector it belongs to. {COLLISION}")
        name = name if name.startswith("model.") else f"model.{name}"
        if name in names:
            raise WeightsError(f"{source} gives the same weight twice, as {names[name]} and as {key}. {COLLISION}")
        names[name] = key
    if stray := [key for name, key in names.items() if not name.startswith(("model.mm_projector.", "model.dino_mm_projector."))]:
        raise WeightsError(f"{source} should hold projectors only: {len(stray)} unexpected: {first_names(sorted(stray))}")
    return {name: state[key] for name, key in names.items()}


def choose_layout(keys: Iterable[str], wanted: str | None, two_encoders: bool, source: object) -> Layout:
    """Return the layout of an original LLaVA checkpoint: LLAVA with one encoder, or MOF with two.

    Args:
        wanted: the expected layout, "llava" or "released-mof"; None follows the keys.
        two_encoders: whether the user named a DINOv2, and so expects two encoders.

    Raises:
        WeightsError: if the projectors do not belong to the expected encoders.
    """
    sets = {name for name in (CLIP, DINO) if any(key.startswith(MOF.key(projector(name), "")) for key in keys)}
    projectors = "; ".join(MOF.key(projector(name), "*") for name in sorted(sets)) or "none"
    if not sets:
        raise WeightsError(f"{source} holds no projector: expected model.mm_projector.*")
    if wanted == LLAVA.name and two_encoders:
        raise ValueError("layout llava has no DINOv2: leave out dino_tower, or the layout")
    if wanted == LLAVA.name and DINO in sets:
        raise WeightsError(
            f"{source} was to be read with one encoder, but holds projectors of two ({projectors}): one would be lost. {COLLISION}"
        )
    if sets != {CLIP, DINO} and (wanted == MOF.name or two_encoders or DINO in sets):
        raise WeightsError(f"{source} was to be read with two encoders, but holds the projectors {projectors}. {COLLISION}")
    return MOF if DINO in sets else LLAVA


def refuse_equal_projectors(projectors: Mapping[str, Mapping[str, Tensor]], source: object) -> None:
    """Raise a WeightsError if both projectors are equal bit for bit, because then the released loader has overwritten one of them."""
    clip, dino = projectors[CLIP], projectors[DINO]
    if clip.keys() == dino.keys() and all(torch.equal(clip[key], dino[key]) for key in clip):
        raise WeightsError(
            f"{source}: the projectors of CLIP and DINOv2 are equal bit for bit, so one has overwritten the other. {COLLISION}"
        )
