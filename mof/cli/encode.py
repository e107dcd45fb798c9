"""`mof encode` lists the known encoders, or writes features of images to a store. torch is imported late: the list does not need it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

import encoders
from encoders.command_groups import resumes
from encoders.command_options import ClusterOptions, EncodingOptions, ImageSources, output_option
from encoders.presets import caveat
from encoders.terminal import say
from mof.cli.encoder_table import print_encoders


@resumes
def encode(
    pattern: Annotated[str | None, typer.Argument(help="With --list: print only encoders whose names match, such as 'siglip*'.")] = None,
    list_encoders: Annotated[bool, typer.Option("--list", help="Print the encoders that are known by name.")] = False,
    text_tower: Annotated[
        bool | None, typer.Option("--text-tower/--no-text-tower", help="With --list: only encoders with, or without, a text tower.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="With --list: only encoders whose licence matches, such as 'apache*'.")] = None,
    images: ImageSources = None,
    encoder: Annotated[
        list[str] | None, typer.Option(help="Name, as --list shows it, or backend:model. Can be given several times.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a saved MoF model. Its encoders run on images as its processor prepares them.")
    ] = None,
    output: Annotated[
        Path | None, output_option("Folder of the store. Images that it already holds are not encoded again.", urls=True)
    ] = None,
    tokens: Annotated[Literal["float16", "bfloat16", "int8"] | None, typer.Option(help="Also store patch tokens, in this format.")] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Layer of the patch tokens: -1 is the last block, -2 the block before. Several layers are put side by side."),
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Without: random weights, always the same.")] = True,
    blurred: Annotated[bool, typer.Option("--blurred", help="With --model: encode the blurred images that VIG compares with.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Delete the features of images whose files are gone.")] = False,
    *,
    encoding: EncodingOptions,
    cluster: ClusterOptions,
) -> None:
    """Write the features of images to a store, or list the encoders.

    The store always holds embeddings; with --tokens, it also holds patch tokens. A run that was stopped goes on with the same
    command. Images that cannot be read are listed in failures.jsonl in the store. Images whose files are gone
    leave the rows of the store; their features stay unless --prune deletes them. Damaged files are found by their digests, and
    their images encoded again; MOF_CHECK=off in the environment saves the time of reading the whole store for it. --dtype bfloat16
    is several times faster on most machines, and less exact.

    \b
    Example:
      mof encode --images photos --encoder clip-vit-l14-336 --encoder dinov2-vit-l14 --output features --tokens int8
    \b
    On all GPUs of a Ray cluster, whose machines see the folder of the store; the result is the same:
      mof encode --images photos --encoder clip-vit-l14-336 --output features --ray head:6379
    """
    if list_encoders:
        print_encoders(pattern, text_tower, licence)
        return
    if (pattern, text_tower, licence) != (None, None, None):
        raise ValueError("a pattern, --text-tower and --licence choose among the encoders of --list")
    if not images or output is None or bool(encoder) == (model is not None):
        raise ValueError("give --images, --output, and either --encoder or --model; `mof encode --list` prints the encoders")
    if model is not None and (encoding.image_size is not None or layer is not None or not pretrained):
        raise ValueError("--image-size, --layer and --no-pretrained go with --encoder; with --model, the model decides them")
    if model is None and blurred:
        raise ValueError("--blurred goes with --model, which says how large its images are")
    import torch  # slow

    arguments = encoding.arguments(cluster.cluster())
    if model is not None:
        built, view = of_model(model, blurred)
    else:
        built, view = {}, None
        layers = layer[0] if layer and len(layer) == 1 else layer
        for name in encoder or []:
            torch.manual_seed(0)  # random weights are the same when the run is resumed
            built[name] = encoders.build_encoder(name, image_size=encoding.image_size, layer=layers, pretrained=pretrained)
    report = encoders.encode_images(images, built, output, tokens=tokens, view=view, strict=strict, prune=prune, **arguments)
    say(f"{output}: {report.summary()}")
    if note := caveat(built):
        say(note)
    failures = output / "failures.jsonl"
    if not report.images:
        raise ValueError(f"none of the images could be read and encoded; {failures} says why")
    if report.unreadable:
        say(f"{failures} lists the images that could not be read or encoded")


def of_model(folder: Path, blurred: bool = False) -> tuple[dict[str, encoders.Encoder], encoders.View]:
    """Return the encoders of a saved MoF model by their names in it, in its dtype, and the view that its processor gives them.

    Raises:
        ValueError: for a folder that holds no MoF model with its processor.
    """
    from transformers import AutoImageProcessor  # slow, and the following import it

    from encoders.saved_folders import WEIGHTS, check_folder, loading, require_config
    from mof import MoFForConditionalGeneration, register_auto_classes
    from mof.checkpoints import build_configured_mixer
    from mof.config import MoFConfig
    from mof.image_processor import MoFImageProcessor

    require_config(folder)
    register_auto_classes()
    check_folder(folder, without=WEIGHTS)
    with loading(folder):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(processor, MoFImageProcessor):
        raise ValueError(f"the processor in {folder} is a {type(processor).__name__}: expected a model of MoFForConditionalGeneration")
    config = MoFConfig.from_pretrained(folder)
    if config.embed_encoders:  # only then are their weights in the checkpoint, beside the weights of the language model
        mixer = MoFForConditionalGeneration.from_pretrained(folder).mixer
    else:
        mixer = build_configured_mixer(config).to(config.dtype)
    return dict(mixer.encoders.items()), replace(processor.view, blurred=blurred)
