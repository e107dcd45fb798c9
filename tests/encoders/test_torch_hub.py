"""DINOv2 by torch.hub's names against timm's, and the spec that rebuilds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from support.tiny_checkpoints import build_dino, randomise
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from encoders import build_encoder
from encoders.backends.torch_hub import MODELS, DinoV2, sizes_of

TINY = {"width": 128, "depth": 2, "heads": 2, "patch_size": 7, "image_size": 28}


@pytest.mark.parametrize("name", MODELS)
def test_architectures_have_timms_weights(name: str) -> None:
    """timm's DINOv2 keeps torch.hub's names, but for the mask token, which it drops."""
    with torch.device("meta"):
        own = DinoV2(**MODELS[name]).state_dict()
        theirs = timm.create_model(
            f"vit_{ {'s': 'small', 'b': 'base', 'l': 'large'}[name[-3]] }_patch14_dinov2", num_classes=0
        ).state_dict()
    assert {key: value.shape for key, value in own.items() if key != "mask_token"} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize(("layer", "norm"), [(-1, False), (-1, True), (1, False), (0, False)])
def test_features_equal_timms(layer: int, norm: bool) -> None:
    encoder = build_encoder("torch_hub:tiny", config=TINY, pretrained=False, layer=layer, norm=norm)
    randomise(encoder.tower)
    sizes = {"embed_dim": 128, "depth": 2, "num_heads": 2, "patch_size": 7, "img_size": 28}
    reference = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **sizes).eval()
    state = encoder.tower.state_dict()
    del state["mask_token"]
    reference.load_state_dict(state)
    x = encoder.prepare(torch.rand(2, 3, 28, 28))
    blocks = reference.forward_intermediates(x, norm=norm, intermediates_only=True, output_fmt="NLC")
    before = reference._pos_embed(reference.patch_embed(x))[:, 1:]
    assert ((before if layer == 0 else blocks[layer - 1 if layer > 0 else layer]) - encoder.patch_tokens(x)).abs().max() < 1e-5
    assert (reference(x) - encoder.image_embedding(x)).abs().max() < 1e-5


def test_positions_are_interpolated_as_in_torch_hub() -> None:
    """By the factor (n + 0.1) / N without antialiasing; on a smooth table that is near timm's way, and not equal."""
    encoder = build_encoder("torch_hub:dinov2_vits14", pretrained=False)
    ramp = torch.linspace(0, 1, 37)
    smooth = torch.stack([ramp[:, None].expand(37, 37), ramp[None].expand(37, 37)], -1).reshape(1, 37 * 37, 2).repeat(1, 1, 192)
    with torch.no_grad():
        encoder.tower.pos_embed[:, 1:] = smooth
    own = encoder.tower.positions(16)
    maps = smooth.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    scale = (16 + 0.1) / 37
    expected = F.interpolate(maps, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    assert torch.equal(own[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 256, 384))
    timms = resample_abs_pos_embed(encoder.tower.pos_embed, [16, 16], [37, 37])
    assert 1e-3 < (own - timms).abs().max() < 0.05


def test_weights_and_spec(tmp_path: Path) -> None:
    state = build_dino()
    torch.save(state, tmp_path / "dino.pth")
    assert sizes_of(state, "state") == TINY
    encoder = build_encoder("torch_hub:tiny", config=TINY, weights=tmp_path / "dino.pth", image_size=42, mean=(0.5, 0.5, 0.5))
    assert encoder.grid == (6, 6) and encoder.width == 128 and not encoder.tower.cls_token.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in encoder.tower.state_dict().items())
    again = build_encoder(**encoder.spec)
    pixels = torch.rand(1, 3, 42, 42)
    assert torch.equal(again(pixels).tokens, encoder(pixels).tokens)
    torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, tmp_path / "training.pth")
    trained = build_encoder("torch_hub:tiny", config=TINY, weights=tmp_path / "training.pth", image_size=42, mean=(0.5, 0.5, 0.5))
    assert torch.equal(trained(pixels).tokens, encoder(pixels).tokens)
    with pytest.raises(ValueError, match=r"blocks.2.norm1.weight"):
        build_encoder("torch_hub:tiny", config=TINY | {"depth": 3}, weights=tmp_path / "dino.pth")


def test_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'dinov2_vitx14'.*dinov2_vit[sbl]14"):
        build_encoder("torch_hub:dinov2_vitx14")
    with pytest.raises(ValueError, match="clip-vit-l14.*hf.*torch_hub"):
        build_encoder("clip-vit-l14", config=TINY, pretrained=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_args: object, **_options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"dinov2_vits14_pretrain.pth \(cached as .*\): no network.*weights=PATH"):
        build_encoder("torch_hub:dinov2_vits14")


def test_hf_config_in_place_of_a_folder() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    processor = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    config = {"model": {"model_type": "clip_vision_model", **sizes}, "processor": processor}
    encoder = build_encoder("hf:some-clip", config=config, pretrained=False)
    assert (encoder.width, encoder.grid, encoder.mean) == (32, (4, 4), (0.1, 0.2, 0.3)) and encoder.spec["config"] == config
    again = build_encoder(**encoder.spec, pretrained=False)
    assert again.tower.config.hidden_size == 32 and again.tower.config.patch_size == 7 and again.std == encoder.std
    with pytest.raises(ValueError):
        build_encoder("hf:some-clip", config=config)  # no weights
