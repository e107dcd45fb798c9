"""Networks that are no plain vision transformers: convolutional, windowed, hybrid. Features against hooks on the networks themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.tiny_towers import randomised
from torch import Tensor, nn

from encoders import Encoder, build_encoder

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}

# name: options that make it tiny, its stages, whether they come as [B, h, w, C].
NETWORKS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "convnext_atto": ({"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, "stages", False),
    "fastvit_t8": ({"embed_dims": (16, 32, 64, 128), "layers": (1, 1, 1, 1)}, "stages", False),
    "swin_tiny_patch4_window7_224": ({"embed_dim": 12, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)}, "layers", True),
}


@pytest.fixture(params=["convnext_atto", "fastvit_t8", "swin_tiny_patch4_window7_224"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    original = timm.create_model

    def create(model: str, **options: Any) -> nn.Module:
        return original(model, **{**NETWORKS[model][0], **options})

    monkeypatch.setattr(timm, "create_model", create)
    return request.param


def stage_outputs(name: str, trunk: Any, x: Tensor) -> list[Tensor]:
    """[B, h*w, C] of each stage, seen by hooks."""
    _, stages, channels_last = NETWORKS[name]
    seen: list[Tensor] = []
    hooks = [stage.register_forward_hook(lambda _m, _i, output: seen.append(output)) for stage in getattr(trunk, stages)]
    with torch.no_grad():
        trunk(x)
    for hook in hooks:
        hook.remove()
    return [(maps if channels_last else maps.permute(0, 2, 3, 1)).flatten(1, 2) for maps in seen]


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_stages_equal_timm_at_any_size(name: str, native: bool, tmp_path: Path) -> None:
    size = {True: 224, False: 160}[native] if name.startswith("swin") else {True: 128, False: 96}[native]
    theirs = randomised(timm.create_model(name, num_classes=5)).eval()
    torch.save(theirs.state_dict(), tmp_path / "network.pt")
    theirs.reset_classifier(0)
    if hasattr(theirs, "set_input_size"):
        theirs.set_input_size((size, size))
    image = torch.rand(2, 3, size, size)
    for layer in (2, -1):
        encoder = build_encoder(f"timm:{name}", weights=tmp_path / "network.pt", image_size=size, layer=layer)
        x = encoder.prepare(image)
        expected = stage_outputs(name, theirs, x)[layer - 1 if layer > 0 else layer]
        torch.testing.assert_close(encoder(image).tokens, expected, **TOLERANCE)
        assert encoder.width == expected.shape[2] and encoder.grid[0] ** 2 == expected.shape[1]
    with torch.no_grad():
        pooled = nn.functional.normalize(theirs(x), dim=-1)
        final = theirs.forward_features(x)
    torch.testing.assert_close(encoder.embed_image(image), pooled, **TOLERANCE)
    assert encoder.embed_dim == pooled.shape[1]
    final = (final if NETWORKS[name][2] else final.permute(0, 2, 3, 1)).flatten(1, 2)
    normed = build_encoder(f"timm:{name}", weights=tmp_path / "network.pt", image_size=size, norm=True)
    torch.testing.assert_close(normed(image).tokens, final, **TOLERANCE)
    assert build_encoder(**encoder.spec).spec == encoder.spec


def test_no_stage_past_the_chosen_one_runs(name: str) -> None:
    encoder = build_encoder(f"timm:{name}", pretrained=False, layer=2)
    ran: list[int] = []
    for index, stage in enumerate(getattr(encoder.tower, NETWORKS[name][1]), start=1):
        stage.register_forward_hook(lambda _m, _i, _o, index=index: ran.append(index))
    encoder(torch.rand(1, 3, 64, 64))
    assert ran == [1, 2]


def test_what_stages_cannot_give_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\[-1, -2\]"):
        build_encoder(f"timm:{name}", pretrained=False, layer=[-1, -2])
    with pytest.raises(ValueError, match=r"layer 0.*1 \(or -4\)"):
        build_encoder(f"timm:{name}", pretrained=False, layer=0)
    with pytest.raises(ValueError, match=r"layer -2.*norm=True.*4 \(or -1\)"):
        build_encoder(f"timm:{name}", pretrained=False, layer=-2, norm=True)
    with pytest.raises(ValueError, match="100.*32"):
        build_encoder(f"timm:{name}", pretrained=False, image_size=100)


def test_layers_of_one_stride_stand_side_by_side() -> None:
    """All of a mixer's do, and the stem and the first stage of a ResNet."""
    encoder = build_encoder("timm:gmixer_12_224", pretrained=False, layer=[-1, 3])
    seen: list[Tensor] = []
    for index in (2, 11):
        encoder.tower.blocks[index].register_forward_hook(lambda _m, _i, output: seen.append(output))
    tokens = encoder(torch.rand(1, 3, 224, 224)).tokens
    assert encoder.width == 768 and torch.equal(tokens, torch.cat([seen[1], seen[0]], dim=-1))
    with torch.device("meta"):
        assert build_encoder("open_clip:RN50", pretrained=False, layer=[1, 2]).width == 64 + 256


@pytest.mark.parametrize(
    ("name", "layer", "size", "grid"),
    [
        ("inception_v3", 2, 320, 76),  # two convolutions without padding
        ("inception_v4", -1, None, 8),  # 299 pixels
        ("levit_128s", -1, None, 4),  # rounds up
        ("pit_ti_224", 1, None, 27),  # overlapping patches
        ("convnext_atto", -1, 288, 9),
    ],
)
def test_grids_that_are_no_quotients_are_measured(name: str, layer: int, size: int | None, grid: int) -> None:
    encoder = build_encoder(f"timm:{name}", pretrained=False, layer=layer, image_size=size)
    assert encoder.grid == (grid, grid) and encoder(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).tokens.shape[1] == grid**2
    assert all(parameter.device.type == "cpu" for parameter in encoder.parameters())


def test_a_grid_is_reached_where_border_pixels_are_lost() -> None:
    with torch.device("meta"):
        encoder = build_encoder("timm:inception_v4", pretrained=False)
        encoder.resize_to((12, 12))
        assert encoder.image_size == 448 and encoder(torch.zeros(1, 3, 8, 8)).grid == (12, 12)


def test_a_network_that_cannot_run_on_a_size_is_refused_with_the_reason() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"Inception.*32 pixels.*RuntimeError"):
        build_encoder("timm:inception_v4", pretrained=False, image_size=32)


def test_a_network_that_looks_at_numbers_is_measured_by_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = timm.models.convnext.ConvNeXt
    own = kind.forward_intermediates
    monkeypatch.setattr(kind, "forward_intermediates", lambda self, x, **options: own(self, x * x.isfinite().all().item(), **options))
    with torch.device("meta"), pytest.raises(ValueError, match=r"ConvNeXt.*160 pixels.*item"):
        build_encoder("timm:test_convnext", pretrained=False)
    assert build_encoder("timm:test_convnext", pretrained=False).grid == (5, 5)


# --- inside open_clip ---


@pytest.fixture(params=["convolutional", "resnet"])
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """The name of a tiny open_clip model and a file with weights."""
    visions = {
        "convolutional": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 96},
        "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 96},
    }
    name = f"tiny-{request.param}"
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 20, "vision_cfg": visions[request.param], "text_cfg": text}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    save_file(randomised(open_clip.create_model(name)).state_dict(), tmp_path / "clip.safetensors")
    return name, tmp_path / "clip.safetensors"


def test_stages_equal_open_clip(clip: tuple[str, Path]) -> None:
    name, weights = clip
    theirs = open_clip.create_model(name, pretrained=str(weights)).eval()
    image = torch.rand(2, 3, 96, 96)
    for layer in (2, -2, -1):
        encoder = build_encoder(f"open_clip:{name}", weights=weights, layer=layer)
        x = encoder.prepare(image)
        visual: Any = theirs.visual
        if name == "tiny-resnet":
            stages = [None, visual.layer1, visual.layer2, visual.layer3, visual.layer4]  # the first is its stem
        else:
            stages = visual.trunk.stages
        seen: list[Tensor] = []
        hook = stages[layer - 1 if layer > 0 else layer].register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output))
        with torch.no_grad():
            expected = theirs.encode_image(x, normalize=True)
        hook.remove()
        torch.testing.assert_close(encoder(image).tokens, seen[0].flatten(2).transpose(1, 2), **TOLERANCE)
        torch.testing.assert_close(encoder.embed_image(image), expected, **TOLERANCE)
    assert encoder.layer == build_encoder(f"open_clip:{name}", pretrained=False).layer == -1  # the default, of stages


def test_text_of_the_built_in_tokenizer(clip: tuple[str, Path]) -> None:
    name, weights = clip
    encoder: Encoder = build_encoder(f"open_clip:{name}", weights=weights)
    theirs = open_clip.create_model(name, pretrained=str(weights)).eval()
    texts = ["a photo of a dog", "Two  cats, asleep"]
    with torch.no_grad():
        expected = theirs.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    torch.testing.assert_close(encoder.embed_text(texts), expected, **TOLERANCE)


def test_resnet_of_open_clip_has_no_norm_and_one_size(clip: tuple[str, Path]) -> None:
    name, _ = clip
    if name != "tiny-resnet":
        pytest.skip("of the ResNet only")
    with pytest.raises(ValueError, match=f"{name}.*norm=False"):
        build_encoder(f"open_clip:{name}", pretrained=False, norm=True)
    with pytest.raises(ValueError, match="96.*128"):
        build_encoder(f"open_clip:{name}", pretrained=False, image_size=128)


def test_every_resnet_of_open_clip_declares_its_widths() -> None:
    for name, width in {"RN50": 2048, "RN101": 2048, "RN50x4": 2560, "RN50x64": 4096}.items():  # CLIP, table 19
        with torch.device("meta"):
            encoder = build_encoder(f"open_clip:{name}/openai", pretrained=False)
            assert encoder(torch.zeros(1, 3, 8, 8)).tokens.shape == (1, (encoder.image_size // 32) ** 2, width)
