"""read_checkpoint reads a checkpoint folder in any known layout into parts. It does not import the multimodal model."""

from __future__ import annotations

import os
from pathlib import Path

from mof.llava.hf import read_hf_llava
from mof.llava.original import read_original
from mof.llava.parts import Checkpoint, OwnCheckpoint, read_config
from mof.llava.towers import Tower
from mof.llava.weights import is_lora

Folder = str | os.PathLike[str]


def read_checkpoint(
    folder: Folder,
    *,
    base: Folder | None = None,
    layout: str | None = None,
    vision_tower: Tower | None = None,
    dino_tower: Tower | None = None,
    released_preprocessing: bool | None = None,
) -> Checkpoint | OwnCheckpoint:
    """Return the parts of a checkpoint folder.

    Args:
        folder: a folder of original LLaVA-1.5 (whole; or `mm_projector.bin` of stage 1, or LoRA, with `base`), of released MoF, of
            Hugging Face LLaVA, or of this library (also as LoRA, with `base`).
        base: the folder of the model on which a stage-1 or LoRA folder was trained.
        layout: "llava" or "released-mof", for one or two expected encoders; by default the keys decide.
        vision_tower: the CLIP or SigLIP to which the checkpoint refers: a local folder, a name for `build_encoder`, or an
            encoder. If the checkpoint holds its weights, only the folder's config.json is used.
        dino_tower: the DINOv2: a file with torch.hub's weights, a name for `build_encoder`, or an encoder.
        released_preprocessing: True normalises DINOv2's pixels for CLIP, as in the released MoF code; False normalises them for
            DINOv2. None follows the checkpoint's config, or is True if the config does not say it.

    Raises:
        ValueError: (mostly WeightsError) for a file or keys that are missing, unexpected, misshapen or ambiguous; the message names
            them.
    """
    folder, base = Path(folder), None if base is None else Path(base)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: expected the folder of a checkpoint")
    lora = is_lora(folder)
    if lora and base is None:
        raise ValueError(
            f"{folder} holds a LoRA adapter: give the folder of the model that it was trained on, base=FOLDER or --base FOLDER"
        )
    config = read_config(base if lora and not (folder / "config.json").is_file() else folder)  # type: ignore[arg-type]
    if config.get("model_type") == "mof":
        return OwnCheckpoint(base, folder) if lora else OwnCheckpoint(folder, None)  # type: ignore[arg-type]
    if "vision_config" in config and "text_config" in config:
        return read_hf_llava(folder, vision_tower)
    towers = {"vision_tower": vision_tower, "dino_tower": dino_tower}
    return read_original(folder, base, layout=layout, **towers, released_preprocessing=released_preprocessing)
