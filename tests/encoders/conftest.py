"""Tiny random models of all backends (`support.tiny_towers`), under the names that `build_encoder` takes.

clip_config    a folder with the open_clip models "tiny-native" and "tiny-timm"
tiny_timm      makes timm build every vision transformer 3 blocks deep and 24 wide, at 4 x 4 patches
hf_folder      (model class name) -> a folder that transformers saved
encoder        one encoder after the other, of every backend; `build` builds it with options
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
from support.tiny_towers import DEPTH, SIZES, randomised, save_hf, write_clip_configs
from torch import nn

from encoders import Encoder, build_encoder


@pytest.fixture(scope="session")
def clip_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    write_clip_configs(folder)
    open_clip.add_model_config(folder)
    return folder


@pytest.fixture
def tiny_timm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    original = timm.create_model

    def create(name: str, **options: Any) -> nn.Module:
        patch = int(name.split("patch")[1].split("_")[0])
        small = {"depth": DEPTH, "embed_dim": 24, "num_heads": 2, "img_size": 4 * patch}
        return original(name, **{**small, **options})

    monkeypatch.setattr(timm, "create_model", create)
    return create


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[[str], str]:
    def save(kind: str) -> str:
        save_hf(kind, tmp_path / kind)
        return str(tmp_path / kind)

    return save


BACKENDS = {
    "open_clip": "open_clip:tiny-native",
    "open_clip with timm": "open_clip:tiny-timm",
    "timm": "timm:vit_small_patch14_reg4_dinov2",
    "hf clip": "CLIPModel",
    "hf dinov2": "Dinov2Model",
    "torch_hub": "torch_hub:tiny",
}


@pytest.fixture(params=BACKENDS)
def build(request: pytest.FixtureRequest, clip_config: Path, tiny_timm: object, hf_folder: Callable[[str], str]) -> Callable[..., Encoder]:
    """`build_encoder` of one backend after the other, with random weights."""
    name = BACKENDS[request.param]
    if ":" not in name:
        name = f"hf:{hf_folder(name)}"

    def of_backend(**options: Any) -> Encoder:
        architecture = {"config": {"width": 24, "depth": DEPTH, "heads": 2, **SIZES}} if name.startswith("torch_hub") else {}
        encoder = build_encoder(name, **{"pretrained": False, **architecture, **options})
        randomised(encoder.tower)
        return encoder

    return of_backend


@pytest.fixture
def encoder(build: Callable[..., Encoder]) -> Encoder:
    return build()
