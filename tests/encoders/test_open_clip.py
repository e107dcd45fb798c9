"""The open_clip backend against open_clip itself, on the same weights."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny_towers import block_outputs, randomised
from torch import nn

from encoders import build_encoder

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(params=["tiny-native", "tiny-timm"])
def name(request: pytest.FixtureRequest, clip_config: Path, tiny_timm: object) -> str:
    return request.param


@pytest.fixture
def weights(name: str, tmp_path: Path) -> Path:
    model = randomised(open_clip.create_model(name))
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


def blocks(visual: Any) -> Any:
    return visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks


@pytest.mark.parametrize("scale", [1, 0.5, 1.5])
def test_features_equal_open_clip_at_any_size(name: str, weights: Path, scale: float) -> None:
    encoder = build_encoder(f"open_clip:{name}", weights=weights)
    size = int(encoder.image_size * scale)
    encoder = build_encoder(f"open_clip:{name}/{weights}", image_size=size)
    # open_clip interpolates the positions of a checkpoint when it loads it into a model of another size.
    theirs = open_clip.create_model(name, pretrained=str(weights), force_image_size=size).eval()
    image = torch.rand(2, 3, size, size)
    x = encoder.prepare(image)
    hidden = block_outputs(blocks(theirs.visual), lambda: theirs.encode_image(x))
    side = encoder.grid[0]
    assert side == 4 * scale
    torch.testing.assert_close(encoder(image).tokens, hidden[-2][:, -side * side :], **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed_image(image), theirs.encode_image(x, normalize=True), **TOLERANCE)


@pytest.mark.parametrize("norm", [False, True])
def test_any_layers_side_by_side(name: str, norm: bool, weights: Path) -> None:
    encoder = build_encoder(f"open_clip:{name}", weights=weights, layer=[-2, 0, 3], norm=norm)
    theirs = open_clip.create_model(name, pretrained=str(weights)).eval()
    visual: Any = theirs.visual
    image = torch.rand(2, 3, encoder.image_size, encoder.image_size)
    hidden = block_outputs(blocks(visual), lambda: theirs.encode_image(encoder.prepare(image)))
    final = visual.trunk.norm if hasattr(visual, "trunk") else visual.ln_post
    with torch.no_grad():
        expected = torch.cat([(final(hidden[layer]) if norm else hidden[layer])[:, -16:] for layer in (-2, 0, 3)], dim=-1)
    assert encoder.width == 72 and encoder.prefix_tokens == 1
    torch.testing.assert_close(encoder(image).tokens, expected, **TOLERANCE)


@pytest.mark.parametrize("tag", ["ViT-B-32/openai", "ViT-B-16-SigLIP/webli", "MobileCLIP2-B/dfndr2b", "PE-Core-T-16-384/meta"])
def test_pixels_come_as_open_clip_makes_them(tag: str) -> None:
    """Central crops and squashed images, bicubic and bilinear."""
    with torch.device("meta"):
        encoder = build_encoder(f"open_clip:{tag}", pretrained=False)
    declared = open_clip.get_pretrained_cfg(*tag.split("/"))
    options = {key: declared[key] for key in ("interpolation", "resize_mode")}
    transform = open_clip.image_transform(encoder.image_size, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, **options)
    image = Image.effect_noise((331, 257), 90).convert("RGB").rotate(30)
    assert (encoder.pixels(image).float() - (transform(image) * 255).round()).abs().max() <= 1


@pytest.fixture
def siglip(clip_config: Path, tmp_path: Path, tiny_timm: object) -> tuple[str, Path]:
    """A tiny SigLIP as open_clip has them: attention pooling, no projection, last text token, canonical text."""
    text = {"context_length": 8, "vocab_size": 10, "width": 24, "heads": 2, "layers": 1, "no_causal_mask": True}
    text |= {"proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    text |= {"hf_tokenizer_name": str(clip_config / "tokenizer"), "tokenizer_kwargs": {"clean": "canonicalize"}}
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none", "image_size": 64}
    config = {"embed_dim": 24, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-siglip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    save_file(randomised(open_clip.create_model("tiny-siglip")).state_dict(), tmp_path / "siglip.safetensors")
    return "tiny-siglip", tmp_path / "siglip.safetensors"


def test_siglip_equals_open_clip(siglip: tuple[str, Path]) -> None:
    name, weights = siglip
    encoder = build_encoder(f"open_clip:{name}", weights=weights, image_size=96)
    theirs = open_clip.create_model(name, pretrained=str(weights), force_image_size=96).eval()
    image = torch.rand(2, 3, 96, 96)
    x = encoder.prepare(image)
    hidden = block_outputs(theirs.visual.trunk.blocks, lambda: theirs.encode_image(x))
    texts = ["A photo; of a Dog.", "red cat"]
    assert encoder.prefix_tokens == 0 and encoder.width == 24
    torch.testing.assert_close(encoder(image).tokens, hidden[-2], **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed_image(image), theirs.encode_image(x, normalize=True), **TOLERANCE)
        expected = theirs.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    torch.testing.assert_close(encoder.embed_text(texts), expected, **TOLERANCE)


def test_text_equals_open_clip(name: str, weights: Path) -> None:
    encoder = build_encoder(f"open_clip:{name}", weights=weights)
    theirs = open_clip.create_model(name, pretrained=str(weights)).eval()
    texts = ["a photo of a dog", "red cat"]
    with torch.no_grad():
        expected = theirs.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    torch.testing.assert_close(encoder.embed_text(texts), expected, **TOLERANCE)


def test_declared_statistics(name: str) -> None:
    encoder = build_encoder(f"open_clip:{name}", pretrained=False)
    declared = open_clip.get_model_preprocess_cfg(open_clip.create_model(name))
    assert (encoder.mean, encoder.std) == (declared["mean"], declared["std"])
    assert encoder.preprocessing.interpolation == declared["interpolation"]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weight_files_load_strictly(name: str, weights: Path, suffix: str, tmp_path: Path) -> None:
    state = open_clip.create_model(name).state_dict()
    state.pop("logit_scale")
    state["extra.weight"] = torch.zeros(1)
    path = tmp_path / f"other.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    with pytest.raises(ValueError) as error:
        build_encoder(f"open_clip:{name}", weights=path)
    for part in (str(path), "logit_scale", "extra.weight"):
        assert part in str(error.value)


def test_weights_from_a_local_dir(name: str, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config(name)}))
    (folder / "open_clip_model.safetensors").write_bytes(weights.read_bytes())
    image = torch.rand(1, 3, 64, 64)
    expected = build_encoder(f"open_clip:{name}", weights=weights)(image).tokens
    assert torch.equal(build_encoder(f"open_clip:local-dir:{folder}")(image).tokens, expected)
    random = build_encoder(f"open_clip:local-dir:{folder}", pretrained=False)
    assert not torch.equal(random(image).tokens, expected)
    (folder / "open_clip_model.safetensors").unlink()
    assert torch.equal(build_encoder(f"open_clip:local-dir:{folder}", weights=weights)(image).tokens, expected)
    build_encoder(f"open_clip:{name}", pretrained=False)
    assert "randomly" not in caplog.text  # open_clip warns of random weights, which are asked for or filled afterwards
    open_clip.create_model(name)
    assert "randomly" in caplog.text and not logging.getLogger().filters


def test_openai_tag_brings_quick_gelu_and_the_tag_its_statistics() -> None:
    with torch.device("meta"):
        openai = build_encoder("open_clip:ViT-B-32/openai", pretrained=False)
        laion = build_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k", pretrained=False)
    activations = [type(encoder.tower.visual.transformer.resblocks[0].mlp.gelu) for encoder in (openai, laion)]
    assert activations == [open_clip.transformer.QuickGELU, nn.GELU]
    with torch.device("meta"):
        siglip = build_encoder("open_clip:ViT-B-16-SigLIP/webli", pretrained=False)
    assert (siglip.mean, siglip.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (siglip.grid, siglip.embed_dim) == ((14, 14), 768)


def test_unknown_model_and_weights_name_near_ones() -> None:
    with pytest.raises(ValueError, match="ViT-L-14-336"):
        build_encoder("open_clip:ViT-L14-336/openai")
    with pytest.raises(ValueError, match="Did you mean openai"):
        build_encoder("open_clip:ViT-B-32/opnai")
    with pytest.raises(ValueError, match="openai, laion400m_e31.*pretrained=False"):
        build_encoder("open_clip:ViT-B-32")
    with pytest.raises(ValueError, match="no-such-file"):
        build_encoder("open_clip:ViT-B-32//tmp/no-such-file.pt")


def test_weights_replace_those_of_the_tag_but_not_what_it_declares(name: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(open_clip, "download_pretrained")
    with monkeypatch.context() as patch:
        patch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"mean": (0.1, 0.2, 0.3)})
        encoder = build_encoder(f"open_clip:{name}/some_tag", weights=weights)
    assert encoder.mean == (0.1, 0.2, 0.3)
    loaded = load_file(weights)
    assert all(torch.equal(value, loaded[key]) for key, value in encoder.tower.state_dict().items())
    with torch.device("meta"):
        openai = build_encoder("open_clip:ViT-B-32/openai", weights=weights, pretrained=False)
    assert isinstance(openai.tower.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)


def test_attention_pooled_tower_has_tokens_but_no_norm_for_them() -> None:
    with torch.device("meta"):
        coca = build_encoder("open_clip:coca_ViT-B-32", pretrained=False)
        assert coca(torch.zeros(1, 3, 9, 9)).tokens.shape == (1, 49, 768)
        with pytest.raises(ValueError, match="norm=False"):
            build_encoder("open_clip:coca_ViT-B-32", pretrained=False, norm=True)


def test_stem_of_a_hybrid_tower_counts_for_the_grid() -> None:
    with torch.device("meta"):
        vitamin = build_encoder("open_clip:ViTamin-S", pretrained=False)
        assert vitamin(torch.zeros(1, 3, 9, 9)).grid == (14, 14)
        vitamin.resize_to((10, 10))
        assert vitamin(torch.zeros(1, 3, 9, 9)).tokens.shape == (1, 100, vitamin.width)


def test_failed_download_says_what_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("open_clip_model.safetensors of timm/vit_base_patch32_clip_224.openai")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(ValueError, match=r"ViT-B-32-quickgelu/openai.*open_clip_model\.safetensors.*weights=PATH"):
        build_encoder("clip-vit-b32")


def test_a_file_that_does_not_say_its_activation_is_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """OpenAI's weights under the plain name would run with GELU in place of QuickGELU, and every feature would be wrong."""
    tower = {"layers": 1, "width": 24, "head_width": 12, "patch_size": 7, "image_size": 28}
    text = {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1}
    for name in ("tiny-act", "tiny-act-quickgelu"):
        config = {"embed_dim": 20, "quick_gelu": name.endswith("quickgelu"), "vision_cfg": tower, "text_cfg": text}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    save_file(open_clip.create_model("tiny-act-quickgelu").state_dict(), tmp_path / "openai.safetensors")
    build_encoder("open_clip:tiny-act-quickgelu", weights=tmp_path / "openai.safetensors")
    build_encoder("open_clip:tiny-act", pretrained=False)
    assert not [warning for warning in recwarn if "activation" in str(warning.message)]
    for name, options in (
        (f"open_clip:tiny-act/{tmp_path}/openai.safetensors", {}),
        ("open_clip:tiny-act", {"weights": tmp_path / "openai.safetensors"}),
    ):
        with pytest.warns(UserWarning, match=r"openai.safetensors .*QuickGELU.* tiny-act-quickgelu"):
            build_encoder(name, **options)


LAYOUTS: dict[str, Any] = {
    "plain": lambda state: state,
    "DIVA's, with the optimiser": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state, "step": 7},
    "several processes": lambda state: {f"module.{name}": value for name, value in state.items()},
    "clip of a larger model": lambda state: {"model": {f"module.clip.{name}": value for name, value in state.items()}},
    "module, as DeepSpeed saves it": lambda state: {"module": {f"clip.{name}": value for name, value in state.items()}, "step": 7},
    "clip_model beside others": lambda state: (
        {"denoiser.weight": torch.ones(2)} | {f"clip_model.{name}": value for name, value in state.items()}
    ),
    "OpenAI's numbers": lambda state: state | {"input_resolution": torch.tensor(28), "vocab_size": torch.tensor(10)},
    "half precision": lambda state: {name: value.half() for name, value in state.items()},
    "scale as a vector": lambda state: state | {"logit_scale": state["logit_scale"].reshape(1)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repaired_clips_load_in_the_layouts_of_training_code(layout: str, name: str, weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    torch.save(LAYOUTS[layout](state), tmp_path / "repaired.pt")
    beside = pytest.warns(UserWarning, match=r"1 tensors outside of 'clip_model\.', such as denoiser\.weight")
    with beside if "beside" in layout else nullcontext():
        encoder = build_encoder(f"open_clip:{name}", weights=tmp_path / "repaired.pt")
    for key, value in encoder.tower.state_dict().items():
        torch.testing.assert_close(value, state[key].half().float() if layout == "half precision" else state[key])
    image = torch.rand(2, 3, 28, 28)
    expected = build_encoder(f"open_clip:{name}", weights=weights)
    tolerance = {"atol": 1e-2 if layout == "half precision" else 1e-6, "rtol": 0}
    torch.testing.assert_close(encoder.embed_image(image), expected.embed_image(image), **tolerance)
    torch.testing.assert_close(encoder.embed_text(["red cat"]), expected.embed_text(["red cat"]), **tolerance)


def test_two_networks_in_one_file_are_refused(name: str, weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    both = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in state.items()}
    torch.save(both, tmp_path / "both.pt")
    with pytest.raises(ValueError, match=r"both\.pt holds this network 2 times, under student\., teacher\."):
        build_encoder(f"open_clip:{name}", weights=tmp_path / "both.pt")
    (first, *_) = (key for key in state if key.startswith("visual."))
    torch.save({f"clip.{key}": value for key, value in state.items() if key != first}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=first.replace(".", r"\.")):
        build_encoder(f"open_clip:{name}", weights=tmp_path / "part.pt")
