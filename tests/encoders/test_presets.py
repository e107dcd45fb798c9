"""The presets, each built without weights: what they are against the papers, and against what timm and open_clip declare."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from encoders import Encoder, build_encoder
from encoders.names import split_weights
from encoders.presets import PRESETS
from mof.cli.encoder_sizes import Unfilled

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# From the papers and the authors' repositories: width, blocks, patch, image size, prefix tokens, joint embedding, statistics.
FACTS = {
    "clip-vit-b32": (768, 12, 32, 224, 1, 512, CLIP),
    "clip-vit-b16": (768, 12, 16, 224, 1, 512, CLIP),
    "clip-vit-l14": (1024, 24, 14, 224, 1, 768, CLIP),
    "clip-vit-l14-336": (1024, 24, 14, 336, 1, 768, CLIP),
    "laion-clip-vit-h14": (1280, 32, 14, 224, 1, 1024, CLIP),
    "laion-clip-vit-bigg14": (1664, 48, 14, 224, 1, 1280, CLIP),
    "dfn-vit-h14": (1280, 32, 14, 224, 1, 1024, CLIP),
    "dfn-vit-h14-378": (1280, 32, 14, 378, 1, 1024, CLIP),
    "metaclip-vit-l14": (1024, 24, 14, 224, 1, 768, CLIP),
    "metaclip-vit-h14": (1280, 32, 14, 224, 1, 1024, CLIP),
    "eva01-vit-g14": (1408, 40, 14, 224, 1, 1024, CLIP),
    "eva02-vit-bige14-plus": (1792, 64, 14, 224, 1, 1024, CLIP),
    "siglip-so400m-14-224": (1152, 27, 14, 224, 0, 1152, HALF),
    "siglip-so400m-14-384": (1152, 27, 14, 384, 0, 1152, HALF),
    "siglip2-so400m-16-512": (1152, 27, 16, 512, 0, 1152, HALF),
    "siglip2-vit-g16-384": (1536, 40, 16, 384, 0, 1536, HALF),
    "pe-core-b16": (768, 12, 16, 224, 1, 1024, HALF),
    "pe-core-l14-336": (1024, 24, 14, 336, 1, 1024, HALF),
    "pe-core-g14-448": (1536, 50, 14, 448, 0, 1280, HALF),
    "mobileclip2-b": (768, 12, 16, 224, 1, 512, PLAIN),
    "dinov2-vit-s14": (384, 12, 14, 518, 1, 384, IMAGENET),
    "dinov2-vit-b14": (768, 12, 14, 518, 1, 768, IMAGENET),
    "dinov2-vit-l14": (1024, 24, 14, 518, 1, 1024, IMAGENET),
    "dinov2-vit-g14": (1536, 40, 14, 518, 1, 1536, IMAGENET),
    "dinov2-vit-s14-reg4": (384, 12, 14, 518, 5, 384, IMAGENET),
    "dinov2-vit-b14-reg4": (768, 12, 14, 518, 5, 768, IMAGENET),
    "dinov2-vit-l14-reg4": (1024, 24, 14, 518, 5, 1024, IMAGENET),
    "dinov2-vit-g14-reg4": (1536, 40, 14, 518, 5, 1536, IMAGENET),
    "dinov3-vit-l16": (1024, 24, 16, 256, 5, 1024, IMAGENET),
    "dinov3-vit-h16-plus": (1280, 32, 16, 256, 5, 1280, IMAGENET),
    "dinov3-vit-7b16": (4096, 40, 16, 256, 5, 4096, IMAGENET),
    "mae-vit-l16": (1024, 24, 16, 224, 1, 1024, IMAGENET),
    "mae-vit-h14": (1280, 32, 14, 224, 1, 1280, IMAGENET),
    "aimv2-l14-336": (1024, 24, 14, 336, 0, 1024, CLIP),
    "mocov3-vit-s16": (384, 12, 16, 224, 1, 384, IMAGENET),
    "mocov3-vit-b16": (768, 12, 16, 224, 1, 768, IMAGENET),
}

# Convolutional: width, stages, stride, image size.
STAGES = {
    "laion-clip-convnext-l-320": (1536, 4, 32, 320),
    "laion-clip-convnext-xxl": (3072, 4, 32, 256),
    "mobileclip2-s0": (512, 4, 32, 256),
    "mobileclip2-s4": (2048, 5, 64, 256),
    "dinov3-convnext-b": (1024, 4, 32, 224),
}

# Millions of parameters in the MMVP-VLM table (arXiv 2401.06209, table 1).
MMVP_VLM = {
    "clip-vit-l14": 427.6,
    "clip-vit-l14-336": 427.9,
    "siglip-so400m-14-224": 877.4,
    "siglip-so400m-14-384": 878.0,
    "dfn-vit-h14": 986.1,
    "dfn-vit-h14-378": 986.7,
    "metaclip-vit-l14": 427.6,
    "metaclip-vit-h14": 986.1,
    "eva01-vit-g14": 1136.4,
    "eva02-vit-bige14-plus": 5044.9,
}

MINE = {name for name, preset in PRESETS.items() if name.startswith("mini-") or preset.model.startswith("package:")}
LONG = {"mobileclip2-s2", "mobileclip2-s3", "mobileclip2-s4"}  # to build
PUBLISHED = [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in sorted(set(PRESETS) - MINE)]


@pytest.fixture(scope="module", params=PUBLISHED)
def preset(request: pytest.FixtureRequest) -> Iterator[tuple[str, Encoder]]:
    """The name of each preset in turn and its encoder, built where any use of the network fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("went to the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        with torch.device("meta"), Unfilled():
            encoder = build_encoder(request.param, pretrained=False)
    yield request.param, encoder


class Left(Exception):
    """Carries what went into the first block out of a forward pass."""


def first_block_input(encoder: Encoder) -> torch.Size:
    tower: Any = getattr(encoder.tower, "visual", encoder.tower)
    tower = getattr(tower, "trunk", tower)
    blocks = tower.transformer.resblocks if hasattr(tower, "transformer") else tower.blocks

    def leave(_block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise Left(inputs[0].shape)

    hook = blocks[0].register_forward_pre_hook(leave)
    with torch.device("meta"), pytest.raises(Left) as left:
        encoder(torch.zeros(1, 3, 50, 40, dtype=torch.uint8))
    hook.remove()
    return left.value.args[0]


@pytest.mark.slow
def test_is_what_the_papers_say(preset: tuple[str, Encoder]) -> None:
    name, encoder = preset
    side = encoder.image_size // encoder.patch_size
    assert encoder.grid == (side, side) and encoder.frozen and not encoder.norm
    parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    assert name not in MMVP_VLM or round(parameters, 1) == MMVP_VLM[name]
    if name in FACTS:
        width, blocks, patch, size, prefix, embed_dim, statistics = FACTS[name]
        assert (encoder.width, encoder.patch_size, encoder.image_size, encoder.embed_dim) == (width, patch, size, embed_dim)
        assert encoder.layers == (blocks - 1 if encoder.has_text else blocks,)
        assert (encoder.mean, encoder.std) == statistics
        assert encoder.prefix_tokens == prefix
        assert first_block_input(encoder) == (1, side * side + prefix, width)
    elif name in STAGES:
        assert (encoder.width, encoder.blocks, encoder.patch_size, encoder.image_size) == STAGES[name]
        with torch.device("meta"):
            assert encoder(torch.zeros(1, 3, 50, 40)).tokens.shape == (1, side * side, encoder.width)
    elif encoder.blocks > 5:
        assert first_block_input(encoder) == (1, side * side + encoder.prefix_tokens, encoder.width)


def test_is_what_its_backend_declares(preset: tuple[str, Encoder]) -> None:
    name, encoder = preset
    backend, _, model = PRESETS[name].model.partition(":")
    assert encoder.image_size == PRESETS[name].image_size
    assert encoder.has_text == (backend == "open_clip")
    if backend == "timm":
        config = timm.get_pretrained_cfg(model)
        assert (3, encoder.image_size, encoder.image_size) == config.input_size
        assert (encoder.preprocessing.fit, encoder.preprocessing.crop_pct) == (
            {"center": "crop", "squash": "squash"}[config.crop_mode],
            config.crop_pct,
        )
        assert (encoder.mean, encoder.std, encoder.preprocessing.interpolation) == (config.mean, config.std, config.interpolation)
        assert PRESETS[name].licence == config.license
        assert config.hf_hub_id or any(source in config.url for source in ("moco-v3", "ijepa"))
        return
    architecture, tag = split_weights(model)
    assert tag in open_clip.list_pretrained_tags_by_model(architecture)
    declared, config = open_clip.get_pretrained_cfg(architecture, tag), open_clip.get_model_config(architecture)
    assert encoder.image_size == config["vision_cfg"]["image_size"] and encoder.embed_dim == config["embed_dim"]
    assert (encoder.mean, encoder.std) == (declared["mean"], declared["std"])
    assert (encoder.preprocessing.interpolation, encoder.preprocessing.crop_pct) == (declared["interpolation"], 1.0)
    assert encoder.preprocessing.fit == {"shortest": "crop", "squash": "squash"}[declared["resize_mode"]]
    assert declared.get("quick_gelu", False) == config.get("quick_gelu", False)
    # Where timm has the same weights from the same place, it declares their licence.
    same = [name for name in timm.list_models(pretrained=True) if timm.get_pretrained_cfg(name).hf_hub_id == declared["hf_hub"].rstrip("/")]
    if tag == "openai":  # timm says apache-2.0; the repository that the weights come from says MIT
        assert PRESETS[name].licence == "mit"
    else:
        assert all(PRESETS[name].licence == timm.get_pretrained_cfg(model).license for model in same)


def test_every_model_of_the_mmvp_vlm_table_is_a_preset() -> None:
    assert set(MMVP_VLM) <= set(PRESETS) and len(MMVP_VLM) == 10
    assert set(FACTS) | set(STAGES) <= set(PRESETS)


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
        encoder = build_encoder("dinov2-vit-s14", pretrained=False, image_size=224, layer=[3, -1], norm=True, trainable=True)
    spec = {"name": "dinov2-vit-s14", "image_size": 224, "layer": [3, -1], "norm": True, "trainable": True}
    assert encoder.spec == spec and encoder.width == 768
    with torch.device("meta"):
        assert build_encoder(**encoder.spec, pretrained=False).spec == spec


def test_every_preset_has_its_row_in_the_printed_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import mof.cli.encoder_table as encoder_table

    shown = ["clip-vit-l14-336", "dinov2-vit-s14-reg4", "laion-clip-convnext-l-320", "mini-clip"]
    monkeypatch.setattr(encoder_table, "available_encoders", lambda: shown)
    encoder_table.print_encoders()
    printed = capsys.readouterr()
    header, *lines = [line.split() for line in printed.out.splitlines()]
    assert printed.err.startswith("mini-clip") and "drawings" in printed.err
    assert header == ["name", "width", "patch", "pixels", "tokens", "params", "(M)", "text", "licence", "of", "the", "weights"]
    assert lines == [
        ["clip-vit-l14-336", "1024", "14", "336", "576", "427.9", "yes", "mit"],
        ["dinov2-vit-s14-reg4", "384", "14", "518", "1369", "22.1", "no", "apache-2.0"],
        ["laion-clip-convnext-l-320", "1536", "32", "320", "100", "351.8", "yes", "mit"],
        ["mini-clip", "192", "8", "40", "25", "2.4", "yes", "apache-2.0"],
    ]
