"""Names, presets, and what goes wrong with them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from encoders import Encoder, available_encoders, build_encoder, register_encoder, registry
from encoders.names import near_names, split_weights


def test_weights_are_not_lost_on_the_meta_device() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="meta.*pretrained=False"):
        build_encoder("dinov2-vit-s14")


def test_a_backend_is_imported_off_the_meta_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting_backend.py").write_text(
        "import torch\nTWO = torch.ones(2).sum().item()\ndef build(model, **options):\n    return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.BACKENDS, "counting", "counting_backend")
    with torch.device("meta"), pytest.raises(ZeroDivisionError):
        build_encoder("counting:any", pretrained=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip-l14", "clip-vit-l14"),
        ("dinov2-s14", "dinov2-vit-s14"),
        ("CLIP-ViT-L14", "Did you mean clip-vit-l14"),
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
@settings(max_examples=30, deadline=None)
def test_any_other_name_is_refused_with_a_value_error(name: str) -> None:
    if name in available_encoders() or name.partition(":")[0] in registry.BACKENDS:
        return
    with pytest.raises(ValueError, match=re.escape(repr(name))):
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
    with pytest.raises(ValueError, match="plain"):
        encoder.embed_image(torch.zeros(2, 3, 9, 9))
    with pytest.raises(ValueError, match="4x4.*5x5"):
        encoder.resize_to((5, 5))
    with pytest.raises(ValueError, match="'plain' is registered already"):
        register_encoder("plain")(plain)
    with pytest.raises(ValueError, match="plain"):
        build_encoder("plian")


@pytest.mark.parametrize("key", ["", "timm:mine", "hf"])
def test_keys_that_read_like_a_backend_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=repr(key)):
        register_encoder(key)


def test_preset_keys_are_taken() -> None:
    with pytest.raises(ValueError, match="'clip-vit-l14'"):
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


def test_names_and_presets_are_known_without_torch() -> None:
    script = "import encoders.presets, encoders, sys; encoders.available_encoders(); print(*sys.modules)"
    root = Path(__file__).parents[2]
    modules = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert {"encoders.registry"} == {"encoders.registry", "torch", "numpy", "timm", "open_clip", "transformers"} & set(modules)
