"""These functions build the encoders of a published checkpoint, with weights from the checkpoint or from the user's files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, CLIPImageProcessor, CLIPVisionConfig, PretrainedConfig

from encoders import Encoder, build_encoder
from encoders.backends.hf import HFEncoder
from encoders.backends.torch_hub import MODELS, TorchHubEncoder, sizes_of
from encoders.weight_files import WeightsError, explain_download, hub_answers, load_strict, read_state, refuse_misfit
from mof.llava.weights import list_faults

Tower = str | os.PathLike[str] | Encoder
"""A user gives an encoder as a local folder or file, as a name for `build_encoder`, or as the encoder itself."""

VISION = ("clip_vision_model", "siglip_vision_model")
"""Values of model_type of the vision models that LLaVA checkpoints may hold."""

OPENAI_WIDTHS = {"openai/clip-vit-base-": 768, "openai/clip-vit-large-": 1024}
"""Beginning of a hub id -> width of the vision tower."""


def build_vision_tower(named: str, given: Tower | None, state: Mapping[str, Tensor], layer: int, source: str) -> Encoder:
    """Return the CLIP or SigLIP of a LLaVA checkpoint.

    Args:
        named: its name in the checkpoint: a hub id, or a path on the machine where it was trained.
        given: the user's encoder, which replaces the named encoder.
        state: transformers' name -> weight; empty if the checkpoint does not hold the weights.
        source: the place of the weights, for messages.

    Raises:
        ValueError: if neither the checkpoint nor the user gives a usable encoder; the message says how to supply it.
    """
    if isinstance(given, Encoder):
        if state:
            load_tower(given, state, source)
        return given
    if state:
        return embedded_vision_tower(named, *_architecture(named, given, state), state, layer, source)
    try:
        name = f"hf:{named}" if given is None else f"hf:{os.path.abspath(given)}" if Path(given).exists() else str(given)
        return build_encoder(name, layer=layer)
    except ValueError as error:
        raise WeightsError(
            f"the checkpoint refers to its vision tower {named!r}, which cannot be loaded: {error}. Give a local folder with its "
            "config.json, preprocessor_config.json and weights: vision_tower=FOLDER, or --vision-tower FOLDER"
        ) from error


def embedded_vision_tower(
    label: str, config: PretrainedConfig, processor: Any, state: Mapping[str, Tensor], layer: int, source: str
) -> Encoder:
    """Return the encoder for a config and an image processor, with the weights `state`. Its spec refers to no file."""
    encoder = build_encoder(f"hf:{label}", config=_inline(config, processor), layer=layer, pretrained=False)
    load_tower(encoder, state, source)
    return encoder


def _architecture(named: str, given: Tower | None, state: Mapping[str, Tensor]) -> tuple[PretrainedConfig, Any]:
    """Return config and image processor of a vision tower whose weights the checkpoint holds."""
    if given is None and named.startswith("openai/clip-vit-"):
        return _openai_clip(named, state)
    folder = named if given is None else os.fspath(given)  # type: ignore[arg-type]  # no Encoder comes here
    with explain_download(f"config.json and preprocessor_config.json of the vision tower {folder} (or give vision_tower=FOLDER)"):
        local = os.path.isdir(folder) or not hub_answers()  # otherwise transformers would wait for each file
        config = AutoConfig.from_pretrained(folder, local_files_only=local, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=local, trust_remote_code=False)
    config = config.vision_config if config.model_type in ("clip", "siglip") else config
    if config.model_type not in VISION:
        raise ValueError(f"the vision tower {folder} is a {config.model_type!r} model; expected one of {', '.join(VISION)}")
    return config, processor


def _openai_clip(named: str, state: Mapping[str, Tensor]) -> tuple[PretrainedConfig, Any]:
    """Return config and image processor, derived from the shapes of the weights. OpenAI's ViTs have 64 channels per head and QuickGELU."""
    shapes = {key.removeprefix("vision_model."): value.shape for key, value in state.items()}
    try:
        width, _, _, patch_size = shapes["embeddings.patch_embedding.weight"]
        positions, mlp = shapes["embeddings.position_embedding.weight"][0], shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise WeightsError(f"the vision tower inside the checkpoint lacks {error}") from error
    size = round((positions - 1) ** 0.5) * patch_size
    depth = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.layers."))
    if width != next((own for kind, own in OPENAI_WIDTHS.items() if named.startswith(kind)), width):
        raise WeightsError(
            f"the vision tower inside the checkpoint is {width} wide, so it is not {named}, as its config.json says. The weights do not "
            "tell how many heads it has: give vision_tower=FOLDER with its config.json and preprocessor_config.json"
        )
    heads = width // 64
    if heads * 64 != width:
        raise WeightsError(
            f"the vision tower is {width} wide, which is none of OpenAI's CLIPs: give vision_tower=FOLDER with its config.json"
        )
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth, "num_attention_heads": heads}
    config = CLIPVisionConfig(**sizes, patch_size=patch_size, image_size=size, hidden_act="quick_gelu")
    return config, CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def build_dino_tower(given: Tower | None, state: Mapping[str, Tensor], width: int, options: Mapping[str, Any], source: str) -> Encoder:
    """Return the DINOv2 of a released MoF checkpoint. It returns the last block's patch tokens, before the final norm.

    Args:
        given: the user's DINOv2: a file with torch.hub's weights, a name for `build_encoder`, or the encoder.
        state: torch.hub's name -> weight; empty if the checkpoint does not hold the weights.
        width: the width of DINOv2's features, taken from the projector.
        options: image_size, and mean and std if they are not DINOv2's own.
        source: the place of the weights, for messages.
    """
    if isinstance(given, Encoder):
        if state:
            load_tower(given, state, source)
        return given
    options = {**options, "layer": -1, "norm": False}
    if state:
        config = sizes_of(state, source)
        encoder = build_encoder(f"torch_hub:{_name_of(width)}", config=config, pretrained=False, **options)
        load_tower(encoder, state, source)
        return encoder
    try:
        if given is not None and Path(given).is_file():
            config = sizes_of(read_state(Path(given)), given)
            return build_encoder(f"torch_hub:{_name_of(width)}", config=config, weights=given, **options)
        return build_encoder(f"torch_hub:{_name_of(width)}" if given is None else str(given), **options)
    except ValueError as error:
        raise WeightsError(
            f"the checkpoint refers to a DINOv2 that is {width} wide, which cannot be loaded: {error}. Give a file with torch.hub's "
            "weights, such as dinov2_vitl14_pretrain.pth, or a name for build_encoder: dino_tower=FILE, or --dino-tower FILE"
        ) from error


def _name_of(width: int) -> str:
    """Return torch.hub's name of the DINOv2 with this width, or "dinov2" for another width, whose encoder needs a config."""
    return next((name for name, sizes in MODELS.items() if sizes["width"] == width), "dinov2")


def embed(encoder: Encoder) -> None:
    """Make an encoder's spec independent of the files from which it was built, because its weights will be in the checkpoint."""
    if isinstance(encoder, HFEncoder) and encoder.config is None:
        # The encoder was built from these files, so they are on this machine.
        processor = AutoImageProcessor.from_pretrained(encoder.source, local_files_only=True, trust_remote_code=False)
        encoder.config = _inline(encoder.tower.config, processor)
    encoder.weights = None


def _inline(config: PretrainedConfig, processor: Any) -> dict[str, Any]:
    """Return the argument `config` of `build_encoder` for an encoder of hf."""
    model = {**config.to_diff_dict(), "model_type": config.model_type}
    model.pop("_name_or_path", None)  # a place on this machine
    return {"model": model, "processor": json.loads(processor.to_json_string())}


def load_tower(encoder: Encoder, state: Mapping[str, Tensor], source: str) -> None:
    """Load the weights that a checkpoint holds into an encoder, in their dtype. Missing and unexpected keys are refused."""
    if isinstance(encoder, TorchHubEncoder):
        load_strict(encoder.tower.to(next(iter(state.values())).dtype), state, source)
    elif isinstance(encoder, HFEncoder):
        config = encoder.tower.config
        encoder.tower = load_pretrained(type(encoder.tower), config, state, source)
        encoder.tower.requires_grad_(not encoder.frozen)
    else:
        raise ValueError(
            f"{source} holds the weights of its encoders, which {type(encoder).__name__} cannot load: expected one of hf or torch_hub"
        )


def load_pretrained(kind: Any, config: PretrainedConfig, state: Mapping[str, Tensor], source: str) -> Any:
    """Return a model of transformers with these weights, in their dtype and in eval mode.

    Raises:
        WeightsError: for keys that are missing, unexpected or of another shape; the message names them.
    """
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}  # other shapes are reported, and refused below
    with refuse_misfit(source):
        model, report = kind.from_pretrained(None, config=config, state_dict=dict(state), **options)
    if faults := list_faults({fault.removesuffix("_keys"): keys for fault, keys in report.items()}):
        raise WeightsError(f"the weights of {source} do not fit its config.json: {faults}")
    return model.eval()
