"""`mof convert`: checkpoints from one layout to another."""

from __future__ import annotations

import json
import logging
import shutil
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from mof.llava.keys import HF_LLAVA, LLAVA, MOF
from mof.llava.loading import Loaded, load_checkpoint, save_checkpoint
from mof.llava.weights import first

logger = logging.getLogger(__name__)

RECORD = "conversion.json"
"""Written beside what was converted: from where, and which files are ours to overwrite."""


class Layout(str, Enum):
    """What `mof convert` writes."""

    mof = "mof"
    hf_llava = HF_LLAVA.name
    llava = LLAVA.name
    released_mof = MOF.name


class OriginalLayout(str, Enum):
    """What a checkpoint of LLaVA's or MoF's own code may be said to be."""

    llava = LLAVA.name
    released_mof = MOF.name


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of LLaVA-1.5 (whole, stage 1, LoRA), MoF, Hugging Face LLaVA, or ours.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[Layout, typer.Option(help="Layout to write; mof is this library's own, which `mof chat` loads.")] = Layout.mof,
    base: Annotated[Path | None, typer.Option(help="What a stage-1 or LoRA folder was trained on.")] = None,
    layout: Annotated[OriginalLayout | None, typer.Option(help="Refuse a source with other encoders than this layout's.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="Folder (or encoder) for the CLIP or SigLIP that the source refers to.")] = None,
    dino_tower: Annotated[str | None, typer.Option(help="File with torch.hub's weights (or encoder) for its DINOv2.")] = None,
    own_preprocessing: Annotated[
        bool, typer.Option("--own-preprocessing", help="Normalise DINOv2's pixels for DINOv2, not for CLIP as released.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that an earlier conversion wrote.")] = False,
) -> None:
    """Read a checkpoint of another code and write it in a layout of choice; every weight is accounted for.

    \b
    Example:
      mof convert llava-v1.5-7b converted --to mof --vision-tower clip-vit-large-patch14-336
    """
    _refuse_foreign(source, out, overwrite)
    loaded = load_checkpoint(
        source,
        base=base,
        layout=None if layout is None else layout.value,
        vision_tower=vision_tower,
        dino_tower=dino_tower,
        released_preprocessing=False if own_preprocessing else None,
    )
    typer.echo(_found(loaded))
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.partial-") as folder:  # a conversion cut off never looks whole
        partial = Path(folder, "whole")
        partial.mkdir()
        save_checkpoint(loaded, partial, to.value)
        files = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
        record = {"source": str(source), "layout": loaded.layout, "to": to.value, "unused": loaded.unused, "files": [*files, RECORD]}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if out.is_dir():
            shutil.rmtree(out)
        partial.rename(out)
    typer.echo(f"written: {out} (layout {to.value}, {len(files)} files)")


def _found(loaded: Loaded) -> str:
    """What was read, in a few lines."""
    model = loaded.model
    llm = model.language_model.config.model_type
    lines = [f"found: layout {loaded.layout}, {loaded.tensors} tensors, {model.dtype}, language model {llm}"]
    place = "inside the checkpoint" if model.config.embed_encoders else "by reference"
    for name, it in model.mixer.encoders.items():
        grid = f"{it.grid[0]} x {it.grid[1]}"
        lines.append(f"  encoder {name}: {it.name}, {it.image_size} px, {grid} patches, layer {it.layer}, {place}")
    if loaded.unused:
        lines.append(f"  {len(loaded.unused)} unused tensors, not kept: {first(loaded.unused, 5)}")
    return "\n".join(lines)


def _refuse_foreign(source: Path, out: Path, overwrite: bool) -> None:
    """ValueError unless `out` is free, or holds nothing but what an earlier conversion wrote and may be replaced."""
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise ValueError(f"{out} holds the source {source}: choose another folder to write")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder to write")
    there = {str(file.relative_to(out)) for file in out.rglob("*") if not file.is_dir()} if out.is_dir() else set()
    if not there:
        return
    if RECORD not in there:
        raise ValueError(f"{out} is not empty, and not the work of `mof convert`: choose another folder")
    if not overwrite:
        raise ValueError(f"{out} holds an earlier conversion: choose another folder, or give --overwrite")
    if foreign := sorted(there - set(json.loads((out / RECORD).read_text())["files"])):
        raise ValueError(f"{out} holds {len(foreign)} files that `mof convert` did not write: {first(foreign)}; choose another folder")
