"""Names, presets, and what goes wrong with them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from encoders import Encoder, available_encoders, build_encoder, register_encoder, registry
from encoders.presets import PRESETS
from encoders.registry import near_names, split_weights

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# name: width, blocks run, patch, image size, side of the grid, prefix tokens, embedding (from the papers' tables).
FACTS = {
    "clip-vit-b32": (768, 11, 32, 224, 7, 1, 512, CLIP),
    "clip-vit-l14": (1024, 23, 14, 224, 16, 1, 768, CLIP),
    "clip-vit-l14-336": (1024, 23, 14, 336, 24, 1, 768, CLIP),
    "dinov2-vit-s14": (384, 12, 14, 518, 37, 1, 384, IMAGENET),
    "dinov2-vit-b14": (768, 12, 14, 518, 37, 1, 768, IMAGENET),
    "dinov2-vit-l14": (1024, 24, 14, 518, 37, 1, 1024, IMAGENET),
    "dinov2-vit-s14-reg4": (384, 12, 14, 518, 37, 5, 384, IMAGENET),
    "dinov2-vit-b14-reg4": (768, 12, 14, 518, 37, 5, 768, IMAGENET),
    "dinov2-vit-l14-reg4": (1024, 24, 14, 518, 37, 5, 1024, IMAGENET),
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", FACTS)
def test_presets_are_what_the_papers_and_backends_say(name: str, no_network: None, blocks_of: Callable[[Encoder], nn.ModuleList]) -> None:
    width, blocks, patch, size, side, prefix, embed_dim, statistics = FACTS[name]
    with torch.device("meta"):
        encoder = build_encoder(name, pretrained=False)
        sequence: list[Any] = []
        blocks_of(encoder)[0].register_forward_hook(lambda _block, _in, output: sequence.append(output.shape[1]))
        features = encoder(torch.zeros(1, 3, 50, 40, dtype=torch.uint8))
    assert features.grid == (side, side) and features.tokens.shape == (1, side * side, width)
    assert sequence == [side * side + prefix]
    assert (encoder.blocks, encoder.patch_size, encoder.image_size) == (blocks, patch, size)
    assert (encoder.embed_dim, encoder.norm, encoder.frozen) == (embed_dim, False, True)
    assert (encoder.mean, encoder.std) == statistics
    assert encoder.has_text == name.startswith("clip")


@pytest.mark.parametrize("name", FACTS)
def test_presets_name_weights_that_exist(name: str) -> None:
    backend, _, model = PRESETS[name].model.partition(":")
    if backend == "timm":
        declared = timm.get_pretrained_cfg(model)
        assert declared.hf_hub_id and declared.input_size == (3, PRESETS[name].image_size, PRESETS[name].image_size)
        assert (declared.mean, declared.std) == FACTS[name][-1]
    else:
        architecture, tag = split_weights(model)
        assert tag == "openai"
        declared = open_clip.get_pretrained_cfg(architecture, tag)
        assert (declared["mean"], declared["std"]) == FACTS[name][-1]
        assert declared["quick_gelu"] and open_clip.get_model_config(architecture)["quick_gelu"]


def test_clip_and_dinov2_meet_on_llavas_grid() -> None:
    with torch.device("meta"):
        clip = build_encoder("clip-vit-l14-336", pretrained=False)
        dino = build_encoder("dinov2-vit-l14", pretrained=False, image_size=336)
        other = build_encoder("clip-vit-b32", pretrained=False)
    assert clip.grid == dino.grid == (24, 24)
    other.resize_to(clip.grid)
    assert other.image_size == 768


def test_preset_options_can_be_overridden() -> None:
    with torch.device("meta"):
        encoder = build_encoder("dinov2-vit-s14", pretrained=False, image_size=224, layer=3, norm=True, trainable=True)
    spec = {"name": "dinov2-vit-s14", "image_size": 224, "layer": 3, "norm": True, "trainable": True}
    assert encoder.spec == spec
    with torch.device("meta"):
        assert build_encoder(**encoder.spec, pretrained=False).spec == spec


def test_weights_are_not_lost_on_the_meta_device() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="meta.*pretrained=False"):
        build_encoder("dinov2-vit-s14")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip-l14", "clip-vit-l14"),
        ("dinov2-s14", "dinov2-vit-s14"),
        ("CLIP-ViT-L14", "Known: .*clip-vit-l14"),
        ("", "open_clip, timm, hf"),
        ("open_clip:", "open_clip, timm, hf"),
        ("torchhub:dinov2", "open_clip, timm, hf"),
        ("clip-vit-l14 ", "Did you mean clip-vit-l14"),
    ],
)
def test_unknown_name_lists_near_ones(name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        build_encoder(name)


@given(st.text(max_size=30))
def test_any_other_name_is_refused_with_a_value_error(name: str) -> None:
    if name in available_encoders() or name.startswith(("open_clip:", "timm:", "hf:")):
        return
    with pytest.raises(ValueError, match="unknown encoder"):
        build_encoder(name)


class Plain(Encoder):
    """A convolution, to register."""

    def __init__(self, **options: Any) -> None:
        sizes = {"width": 8, "depth": 1, "patch_size": 4, "image_size": 16}
        super().__init__(nn.Conv2d(3, 8, 4, 4), **sizes, mean=(0.5,) * 3, std=(0.5,) * 3, **options)

    def patch_tokens(self, x: torch.Tensor) -> torch.Tensor:
        return self.tower(x).flatten(2).transpose(1, 2)  # [B, h*w, D]

    def image_embedding(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("never called: there is no embed_dim")


def test_register_an_encoder_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    available_encoders()
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))

    @register_encoder("plain")
    def plain(layer: int | None, norm: bool | None, trainable: bool, **_: Any) -> Encoder:
        return Plain(layer=layer, norm=norm, trainable=trainable)

    assert "plain" in available_encoders() and available_encoders() == sorted(available_encoders())
    encoder = build_encoder("plain", trainable=True)
    assert encoder.spec == {"name": "plain", "image_size": 16, "layer": -1, "norm": False, "trainable": True}
    assert encoder(torch.zeros(2, 3, 9, 9, dtype=torch.uint8)).tokens.shape == (2, 16, 8)
    with pytest.raises(ValueError, match="plain has no embedding"):
        encoder.embed_image(torch.zeros(2, 3, 9, 9))
    with pytest.raises(ValueError, match="4x4.*5x5"):
        encoder.resize_to((5, 5))
    with pytest.raises(ValueError, match="'plain' is registered already"):
        register_encoder("plain")(plain)
    with pytest.raises(ValueError, match="plain"):
        build_encoder("plian")


@pytest.mark.parametrize("key", ["", "timm:mine", "hf"])
def test_keys_that_read_like_a_backend_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="cannot be the key"):
        register_encoder(key)


def test_preset_keys_are_taken() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register_encoder("clip-vit-l14")(Plain)


@given(model=st.text("abcXYZ019-_.", min_size=1), weights=st.text("abc019-_./", min_size=1))
def test_split_weights_splits_at_the_first_slash(model: str, weights: str) -> None:
    assert split_weights(f"{model}/{weights}") == (model, weights)
    assert split_weights(model) == (model, None)
    for scheme in ("hf-hub:", "local-dir:"):
        assert split_weights(f"{scheme}{model}/{weights}") == (f"{scheme}{model}/{weights}", None)


@given(st.lists(st.text("abcdef", min_size=4, max_size=8), min_size=1, unique=True), st.data())
def test_a_name_is_near_itself_but_for_a_letter(known: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(known))
    assert name in near_names(name[:-1], [name])
    assert near_names("0123456789", known) == ""


def test_importing_the_package_imports_no_backend() -> None:
    script = "import encoders, sys; encoders.available_encoders(); print(*sys.modules)"
    root = Path(__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True).stdout
    assert {"encoders"} == {"encoders", "timm", "open_clip", "transformers"} & set(output.split())
