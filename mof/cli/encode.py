"""`mof encode`: the encoders that are known, and features of images written to a store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoImageProcessor

from encoders import Encoder, View, build_encoder, encode_images
from encoders.store.token_formats import TOKEN_FORMATS
from mof.checkpoints import build_configured_mixer
from mof.cli.encoder_table import print_encoders
from mof.config import MoFConfig
from mof.model import MoFForConditionalGeneration
from mof.processor import MoFImageProcessor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def encode(
    list_encoders: Annotated[bool, typer.Option("--list", help="Print the encoders that are known by name.")] = False,
    images: Annotated[
        list[str] | None, typer.Option(help="Folder, list (.txt), image or .tar, or a pattern of these: 'train-{000..127}.tar'. Several.")
    ] = None,
    encoder: Annotated[list[str] | None, typer.Option(help="Name, as --list shows it, or backend:model. Several.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a saved MoF model: its encoders, and what they see.")] = None,
    out: Annotated[Path | None, typer.Option(help="The store's folder. What it holds is not encoded again.")] = None,
    tokens: Annotated[str | None, typer.Option(help=f"Also store patch tokens: {', '.join(TOKEN_FORMATS)}.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the encoders' input, in pixels. Their own by default.")] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Whose patch tokens: -1 the last block, -2 the one before. Several: side by side.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Without: random weights, always the same.")] = True,
    blurred: Annotated[bool, typer.Option("--blurred", help="With --model: of the blurred images that VIG compares with.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32,
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Precision of the encoders: {', '.join(DTYPES)}. Theirs by default: float32.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and decode.")] = 2,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
) -> None:
    """Write the features of images to a store, or list the encoders.

    Embeddings always, patch tokens with --tokens. Stopped and called again, it goes on where it was. Images that cannot be read
    are listed in failures.jsonl in the store. --dtype bfloat16 is several times faster on most machines, and less exact.

    \b
    Example:
      mof encode --images photos --encoder clip-vit-l14-336 --encoder dinov2-vit-l14 --out features --tokens int8
    """
    if list_encoders:
        print_encoders()
        return
    if not images or out is None or bool(encoder) == (model is not None):
        raise ValueError("give --images, --out, and either --encoder or --model; `mof encode --list` prints the encoders")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown --dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    view: View | None = None
    if model is not None:
        if image_size is not None or layer is not None or not pretrained:
            raise ValueError("--image-size, --layer and --no-pretrained go with --encoder; with --model they are the model's")
        built, view = of_model(model, blurred)
    elif blurred:
        raise ValueError("--blurred goes with --model, which says how large its images are")
    else:
        built = {}
        layers = layer[0] if layer and len(layer) == 1 else layer
        for name in encoder or []:
            torch.manual_seed(0)  # random weights are the same when the run is resumed
            built[name] = build_encoder(name, image_size=image_size, layer=layers, pretrained=pretrained)
    report = encode_images(
        images,
        built,
        out,
        tokens=tokens,  # type: ignore[arg-type]  # checked there
        view=view,
        batch_size=batch_size,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=DTYPES[dtype] if dtype else None,
        workers=workers,
        strict=strict,
        progress=True,
    )
    typer.echo(f"{out}: {report.summary()}")
    if report.unreadable:
        typer.echo(f"what could not be read is listed in {out / 'failures.jsonl'}")


def of_model(folder: Path, blurred: bool = False) -> tuple[dict[str, Encoder], View]:
    """The encoders of a saved MoF model by their names in it, in its dtype, and what its processor shows them.

    Raises:
        ValueError: for a folder that holds no MoF model with its processor.
    """
    if not (folder / "config.json").is_file():  # or transformers takes a mistyped folder for a name on the hub
        raise ValueError(f"{folder} holds no config.json: expected a folder that save_pretrained wrote")
    processor = AutoImageProcessor.from_pretrained(folder)
    if not isinstance(processor, MoFImageProcessor):
        raise ValueError(f"the processor in {folder} is a {type(processor).__name__}: expected a model of MoFForConditionalGeneration")
    config = MoFConfig.from_pretrained(folder)
    if config.embed_encoders:  # only then do their weights lie in the checkpoint, among those of the language model
        mixer = MoFForConditionalGeneration.from_pretrained(folder).mixer
    else:
        mixer = build_configured_mixer(config).to(config.dtype)
    return dict(mixer.encoders.items()), replace(processor.view, blurred=blurred)
