"""`mof convert` brings a checkpoint from one layout to another. Slow libraries are imported late, so that the help text comes at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from encoders.command_groups import starts_over
from encoders.command_options import output_option
from encoders.names import first_names
from encoders.terminal import say
from encoders.text_files import parse_json, read_utf8
from encoders.whole_files import replace_folder, unfinished_folder, write_json

if TYPE_CHECKING:
    from mof.llava.loading import Loaded

RECORD = "conversion.json"
"""File beside a converted model that names its source, and the files that the next conversion may overwrite."""


@starts_over
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of LLaVA-1.5 (whole, stage 1, LoRA), MoF, Hugging Face LLaVA, or ours.")],
    out: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    output: Annotated[Path | None, output_option("Folder to write.")] = None,
    to: Annotated[
        Literal["mof", "hf-llava", "llava", "released-mof"],
        typer.Option(help="Layout to write; mof is this library's own, which `mof chat` loads."),
    ] = "mof",
    base: Annotated[Path | None, typer.Option(help="Folder that a stage-1 or LoRA folder was trained on.")] = None,
    layout: Annotated[
        Literal["llava", "released-mof"] | None, typer.Option(help="Refuse a source with other encoders than this layout's.")
    ] = None,
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
      mof convert llava-v1.5-7b --output converted --to mof --vision-tower clip-vit-large-patch14-336
    """
    if (output is None) == (out is None):
        raise ValueError("give the folder to write once, as --output FOLDER")
    folder = output or out
    assert folder is not None
    _refuse_foreign(source, folder, overwrite)
    from mof.llava.loading import load_checkpoint, save_checkpoint  # slow

    released = False if own_preprocessing else None
    towers = {"vision_tower": vision_tower, "dino_tower": dino_tower}
    loaded = load_checkpoint(source, base=base, layout=layout, **towers, released_preprocessing=released)
    say(_describe(loaded))
    with unfinished_folder(folder) as partial:  # a conversion that is cut off must not look whole
        save_checkpoint(loaded, partial, to)
        files = [*_files(partial), RECORD]
        record = {"format": 1, "source": str(source), "layout": loaded.layout, "to": to, "unused": loaded.unused, "files": files}
        write_json(partial / RECORD, record)
        replace_folder(folder, partial)
    say(f"written: {folder} (layout {to}, {len(files) - 1} files)")


def _describe(loaded: Loaded) -> str:
    """Return a few lines about a checkpoint that was read."""
    model = loaded.model
    llm = model.language_model.config.model_type
    lines = [f"found: layout {loaded.layout}, {loaded.tensors} tensors, {model.dtype}, language model {llm}"]
    place = "inside the checkpoint" if model.config.embed_encoders else "by reference"
    for name, encoder in model.mixer.encoders.items():
        grid = f"{encoder.grid[0]} x {encoder.grid[1]}"
        lines.append(f"  encoder {name}: {encoder.name}, {encoder.image_size} px, {grid} patches, layer {encoder.layer}, {place}")
    if loaded.unused:
        lines.append(f"  {len(loaded.unused)} unused tensors, not kept: {first_names(loaded.unused, 5)}")
    return "\n".join(lines)


def _refuse_foreign(source: Path, out: Path, overwrite: bool) -> None:
    """Raise a ValueError unless `out` is free, or holds only files of an earlier conversion that may be replaced."""
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise ValueError(f"{out} holds the source {source}: choose another folder to write")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder to write")
    present = _files(out)
    if not present:
        return
    if RECORD not in present:
        raise ValueError(f"{out} is not empty, and not the work of `mof convert`: choose another folder")
    if not overwrite:
        raise ValueError(f"{out} holds an earlier conversion: choose another folder, or give --overwrite")
    try:
        written = set(parse_json(read_utf8(out / RECORD), out / RECORD)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out / RECORD} is damaged ({error}): delete {out}, or choose another folder") from error
    if foreign := sorted(set(present) - written):
        names = first_names(foreign, 5)
        raise ValueError(f"{out} holds {len(foreign)} files that `mof convert` did not write: {names}; choose another folder")


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())
