"""The timm backend against timm itself, on the same weights."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny_towers import block_outputs, randomised
from timm.models import eva, vision_transformer
from torch import nn

from encoders import build_encoder

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
Create = Callable[..., nn.Module]

# Class token; registers beside it; none but attention pooling; pre-norm (CLIP); rotary positions with and without registers;
# no class token and RMS norms; relative positions.
MODELS = [
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "vit_base_patch32_clip_224",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_pe_core_tiny_patch16_384",
    "aimv2_large_patch14_224",
    "vit_base_patch16_radio_v3",
    "vit_base_patch14_reg1_tipsv2",
    "vit_pe_spatial_tiny_patch16_512",
]


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def weights(name: str, tmp_path: Path, tiny_timm: Create) -> Path:
    save_file(randomised(tiny_timm(name, num_classes=0)).state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def test_weights_in_the_layouts_of_training_code(name: str, weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    layouts: dict[str, Any] = {
        "processes": {f"module.{key}": value for key, value in state.items()},
        "classifier": {"model": {f"backbone.{key}": value for key, value in state.items()} | {"backbone.head.weight": torch.ones(3, 2)}},
        "teacher": {"teacher": {f"backbone.{key}": value for key, value in state.items()}, "iteration": 9},
    }
    for layout, content in layouts.items():
        torch.save(content, tmp_path / f"{layout}.pth")
        loaded = build_encoder(f"timm:{name}", weights=tmp_path / f"{layout}.pth").tower.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.items()) and loaded, layout
    torch.save({"teacher": state, "student": layouts["processes"]}, tmp_path / "both.pth")
    with pytest.raises(ValueError, match=r"both\.pth holds this network 2 times, under teacher\., student\.module\."):
        build_encoder(f"timm:{name}", weights=tmp_path / "both.pth")


@pytest.mark.parametrize("side", [4, 2, 6])
def test_features_equal_timm_at_any_size(name: str, weights: Path, side: int, tiny_timm: Create) -> None:
    encoder = build_encoder(f"timm:{name}", weights=weights)
    size = side * encoder.patch_size
    encoder = build_encoder(f"timm:{name}/{weights}", image_size=size)
    # timm interpolates the positions of a checkpoint when it loads it into a model of another size.
    theirs = tiny_timm(name, num_classes=0, img_size=size).eval()
    state = timm.models.load_state_dict(str(weights))
    kind = eva if isinstance(theirs, eva.Eva) else vision_transformer
    theirs.load_state_dict(kind.checkpoint_filter_fn(state, theirs))
    image = torch.rand(2, 3, size, size)
    x = encoder.prepare(image)
    hidden = block_outputs(theirs.blocks, lambda: theirs(x))
    torch.testing.assert_close(encoder(image).tokens, hidden[-1][:, -side * side :], **TOLERANCE)
    with torch.no_grad():
        expected = nn.functional.normalize(theirs(x), dim=-1)
    torch.testing.assert_close(encoder.embed_image(image), expected, **TOLERANCE)


@pytest.mark.parametrize("norm", [False, True])
def test_any_layers_side_by_side(name: str, norm: bool, weights: Path, tiny_timm: Create) -> None:
    encoder = build_encoder(f"timm:{name}/{weights}", layer=[-2, 0, 3], norm=norm)
    theirs = tiny_timm(name, num_classes=0).eval()
    theirs.load_state_dict(timm.models.load_state_dict(str(weights)))
    image = torch.rand(2, 3, encoder.image_size, encoder.image_size)
    hidden = block_outputs(theirs.blocks, lambda: theirs(encoder.prepare(image)))
    with torch.no_grad():
        chosen = [theirs.norm(hidden[layer]) if norm else hidden[layer] for layer in (-2, 0, 3)]
    assert (encoder.width, encoder.blocks, encoder.layers) == (72, 3, (2, 0, 3))
    torch.testing.assert_close(encoder(image).tokens, torch.cat([tokens[:, -16:] for tokens in chosen], dim=-1), **TOLERANCE)
    assert encoder.prefix_tokens == hidden[1].shape[1] - 16
    again = build_encoder(**json.loads(json.dumps(encoder.spec)))
    assert torch.equal(again(image).tokens, encoder(image).tokens)


PIXELS = ["vit_base_patch16_224.mae", "vit_so400m_patch14_siglip_378.webli_ft_in1k", "dm_nfnet_f0.dm_in1k", "test_vit.r160_in1k"]


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_come_as_timm_makes_them(name: str) -> None:
    """Crops of 0.9, squashed whole images, squashed and cropped ones, and bilinear or bicubic filters."""
    with torch.device("meta"):
        encoder = build_encoder(f"timm:{name}", pretrained=False)
    transform: Any = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()))
    image = Image.effect_noise((331, 257), 90).convert("RGB").rotate(30)
    normalise = transform.transforms[-1]
    expected = transform(image) * normalise.std[:, None, None] + normalise.mean[:, None, None]
    assert (encoder.pixels(image).float() - (expected * 255).round()).abs().max() <= 1


def test_embedding_of_dinov2_is_its_normalised_class_token(tiny_timm: Create) -> None:
    encoder = build_encoder("timm:vit_small_patch14_reg4_dinov2", pretrained=False)
    image = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        expected = encoder.tower.forward_features(encoder.prepare(image))[:, 0]
    torch.testing.assert_close(encoder.embed_image(image), nn.functional.normalize(expected, dim=-1), **TOLERANCE)


def test_size_that_patches_do_not_fill(tiny_timm: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SigLIP at 384 pixels with patches of 14: timm drops the last pixels. Other sizes have to be multiples."""
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: tiny_timm(*args, **options, img_size=60))
    encoder = build_encoder("timm:vit_small_patch14_dinov2", pretrained=False)
    assert (encoder.image_size, encoder.grid) == (60, (4, 4))
    encoder.resize_to((4, 4))
    image = torch.rand(1, 3, 60, 60)
    with torch.no_grad():
        expected = encoder.tower.forward_features(encoder.prepare(image))[:, 1:]
    assert torch.equal(encoder.tower.norm(encoder(image).tokens), expected)
    encoder.resize_to((5, 5))
    assert encoder.image_size == 70


def test_metas_own_dinov2_checkpoint_loads(tiny_timm: Create, tmp_path: Path) -> None:
    """It has a mask token, and a position for the class token, which timm adds to that token if it has registers."""
    encoder = build_encoder("timm:vit_small_patch14_reg4_dinov2", pretrained=False)
    state = encoder.tower.state_dict()
    theirs = {key: value.clone() for key, value in state.items() if key not in ("reg_token", "pos_embed", "cls_token")}
    class_position = torch.randn(1, 1, 24)
    theirs |= {
        "mask_token": torch.zeros(1, 24),
        "register_tokens": state["reg_token"].clone(),
        "cls_token": state["cls_token"] - class_position,
        "pos_embed": torch.cat([class_position, state["pos_embed"]], dim=1),
    }
    torch.save(theirs, tmp_path / "dinov2.pth")
    again = build_encoder("timm:vit_small_patch14_reg4_dinov2", weights=tmp_path / "dinov2.pth")
    image = torch.rand(1, 3, 56, 56)
    torch.testing.assert_close(again(image).tokens, encoder(image).tokens, **TOLERANCE)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weight_files_load_strictly(suffix: str, tiny_timm: Create, tmp_path: Path) -> None:
    state = tiny_timm("vit_small_patch14_dinov2", num_classes=0).state_dict()
    state["extra.weight"] = state.pop("norm.weight")
    path = tmp_path / f"other.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    with pytest.raises(ValueError) as error:
        build_encoder("timm:vit_small_patch14_dinov2", weights=path)
    for part in (str(path), "norm.weight", "extra.weight"):
        assert part in str(error.value)


def test_classifier_of_a_weight_file_is_left_out(tiny_timm: Create, tmp_path: Path) -> None:
    classifier = tiny_timm("vit_small_patch14_dinov2", num_classes=5)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
    encoder = build_encoder("timm:vit_small_patch14_dinov2", weights=tmp_path / "classifier.pt")
    assert torch.equal(encoder.tower.norm.weight, classifier.norm.weight)


class Trap:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize("content", [pickle.dumps({"norm.weight": Trap()}, protocol=2), b"", b"no weights"], ids=["code", "empty", "text"])
def test_unsafe_and_broken_files_are_refused(content: bytes, tiny_timm: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("weights.pt", "weights.safetensors"):
        Path(file).write_bytes(content)
        with pytest.raises(ValueError, match=file):
            build_encoder("timm:vit_small_patch14_dinov2", weights=file)
    assert not Path("trapped").exists()


def test_file_that_is_no_state_dict_is_refused(tiny_timm: Create, tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt"):
        build_encoder("timm:vit_small_patch14_dinov2", weights=tmp_path / "list.pt")


def test_unknown_model_tag_and_file_are_named() -> None:
    with pytest.raises(ValueError, match="Did you mean.*vit_small_patch14_dinov2"):
        build_encoder("timm:vit_smal_patch14_dinov2")
    with pytest.raises(ValueError, match=r"'wrong'.*vit_small_patch14_dinov2\.lvd142m"):
        build_encoder("timm:vit_small_patch14_dinov2.wrong")
    with pytest.raises(ValueError, match="no-such-file"):
        build_encoder("timm:vit_small_patch14_dinov2", weights="no-such-file.pt")


def test_model_without_intermediate_features_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm.models.resnet.ResNet, "forward_intermediates", None)
    with pytest.raises(ValueError, match="ResNet.*forward_intermediates"):
        build_encoder("timm:test_resnet", pretrained=False)


def test_trunk_without_a_classifier_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="Qwen3VitEncoder"):
        build_encoder("timm:qwen3_vit_88m_enc", pretrained=False)


def test_failed_download_says_what_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    hub = r"vit_small_patch14_dinov2\.lvd142m.*model\.safetensors of timm/vit_small_patch14_dinov2\.lvd142m"
    with pytest.raises(ValueError, match=rf"{hub}.*no network.*weights=PATH"):
        build_encoder("dinov2-vit-s14")


def test_weights_from_a_folder_load_strictly(tmp_path: Path) -> None:
    """Through timm's own loader, which forgives missing keys when the number of classes is not the declared one."""
    network = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(network, tmp_path, model_config={"num_classes": 3})
    encoder = build_encoder(f"timm:local-dir:{tmp_path}")
    assert torch.equal(encoder.tower.norm.weight, network.norm.weight)
    state = network.state_dict()
    state["extra.weight"] = state.pop("norm.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        build_encoder(f"timm:local-dir:{tmp_path}")
    assert "norm.weight" in str(error.value) and "extra.weight" in str(error.value)


@pytest.mark.slow
def test_moco_v3_checkpoint_gives_its_encoder(tmp_path: Path) -> None:
    """Keys as in Meta's vit-s-300ep.pth.tar: encoder, moving average, predictor, and projection heads on both."""
    generator = torch.Generator().manual_seed(3)
    encoder = build_encoder("mocov3-vit-s16", pretrained=False)
    own = {key: torch.randn(value.shape, generator=generator) for key, value in encoder.tower.state_dict().items()}
    state = {f"module.base_encoder.{key}": value for key, value in own.items()}
    state |= {f"module.momentum_encoder.{key}": torch.zeros_like(value) for key, value in own.items()}
    for network in ("module.base_encoder.head", "module.momentum_encoder.head", "module.predictor"):
        state |= {f"{network}.0.weight": torch.zeros(4, 384), f"{network}.1.running_mean": torch.zeros(4)}
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {}}, tmp_path / "vit-s-300ep.pth.tar")
    loaded = build_encoder("mocov3-vit-s16", weights=tmp_path / "vit-s-300ep.pth.tar").tower
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())
    assert loaded.blocks[0].attn.num_heads == 12
    del state["module.base_encoder.norm.bias"]
    torch.save({"state_dict": state}, tmp_path / "other.pth.tar")
    with pytest.raises(ValueError, match=r"other\.pth\.tar(.|\n)*norm\.bias"):
        build_encoder("mocov3-vit-s16", weights=tmp_path / "other.pth.tar")


def test_spec_keeps_a_given_weight_file(tiny_timm: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(tiny_timm("vit_small_patch14_dinov2", num_classes=0).state_dict(), tmp_path / "vit.pt")
    monkeypatch.chdir(tmp_path)
    encoder = build_encoder("timm:vit_small_patch14_dinov2", weights="vit.pt")
    monkeypatch.chdir("/")
    again = build_encoder(**encoder.spec)
    assert encoder.spec["weights"] == str(tmp_path / "vit.pt")
    assert torch.equal(again(image := torch.rand(1, 3, 56, 56)).tokens, encoder(image).tokens)
    build_encoder(**{**encoder.spec, "weights": "gone.pt"}, pretrained=False)  # reads no file
