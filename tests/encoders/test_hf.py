"""The transformers backend against transformers itself, on the same weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny_towers import hooks_of
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessor

from encoders import build_encoder
from encoders.backends.hf import FAMILIES

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
SPECIAL = ("ViTMAEModel", "VJEPA2Model", "RadioModel", "IJepaModel", "ViTMSNModel")
KINDS = [family.model for family in FAMILIES.values() if family.model not in SPECIAL]
IMAGE_TEXT = ["CLIPModel", "SiglipModel", "MetaClip2Model", "Aimv2Model", "Tipsv2Model"]
PROJECTED = ["CLIPModel", "MetaClip2Model", "Aimv2Model"]
Folder = Callable[[str], str]
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {"image_size": 28, "patch_size": 7}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [4, 6])
def test_features_equal_transformers_at_any_size(kind: str, side: int, hf_folder: Folder) -> None:
    folder = hf_folder(kind)
    theirs = getattr(transformers, kind).from_pretrained(folder).eval()
    vision = getattr(theirs, "vision_model", theirs)
    image = torch.rand(2, 3, 7 * side, 7 * side)
    layers = list(range(-4, 4))
    encoder = build_encoder(f"hf:{folder}", image_size=7 * side, layer=layers)
    interpolate = {"interpolate_pos_encoding": True} if encoder.family.positions else {}
    with torch.no_grad():
        output = vision(encoder.prepare(image), output_hidden_states=True, **interpolate)
    expected = torch.cat([output.hidden_states[layer][:, -side * side :] for layer in layers], dim=-1)
    torch.testing.assert_close(encoder(image).tokens, expected, **TOLERANCE)
    pooled = output.pooler_output
    if kind in PROJECTED:
        pooled = theirs.visual_projection(pooled)
    torch.testing.assert_close(encoder.embed_image(image), nn.functional.normalize(pooled, dim=-1), **TOLERANCE)


@pytest.mark.parametrize("kind", IMAGE_TEXT)
def test_text_equals_transformers(kind: str, hf_folder: Folder) -> None:
    folder = hf_folder(kind)
    theirs = getattr(transformers, kind).from_pretrained(folder).eval()
    texts = ["a photo of a dog", "red cat"] if kind == "SiglipModel" else ["a photo of a dog </s>", "red cat </s>"]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", max_length=8, return_tensors="pt")
    image = torch.rand(2, 3, 28, 28)
    encoder = build_encoder(f"hf:{folder}")
    with torch.no_grad():
        output = theirs(**tokens, pixel_values=encoder.prepare(image))
    torch.testing.assert_close(encoder.embed_text(texts), output.text_embeds, **TOLERANCE)
    torch.testing.assert_close(encoder.embed_image(image), output.image_embeds, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("side", [4, 6])
def test_radio_normalises_inside_and_embeds_by_its_class_tokens(side: int, hf_folder: Folder) -> None:
    folder = hf_folder("RadioModel")
    theirs = transformers.RadioModel.from_pretrained(folder).eval()
    image = torch.rand(2, 3, 7 * side, 7 * side)
    encoder = build_encoder(f"hf:{folder}", image_size=7 * side, layer=[1, -1])
    output = theirs(image, output_hidden_states=True)
    expected = torch.cat([output.hidden_states[1][:, -side * side :], output.features], dim=-1)
    torch.testing.assert_close(encoder(image).tokens, expected, **TOLERANCE)
    torch.testing.assert_close(encoder.embed_image(image), nn.functional.normalize(output.summary, dim=-1), **TOLERANCE)
    assert encoder.embed_dim == 48 and encoder.prefix_tokens == 5
    with pytest.raises(ValueError, match="no final norm"):
        build_encoder(f"hf:{folder}", norm=True)


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
def test_v_jepa_sees_an_image_as_two_equal_frames(norm: bool, hf_folder: Folder) -> None:
    folder = hf_folder("VJEPA2Model")
    theirs = transformers.VJEPA2Model.from_pretrained(folder).eval()
    image = torch.rand(2, 3, 28, 28)
    encoder = build_encoder(f"hf:{folder}", layer=[0, 1, -1], norm=norm)
    x = encoder.prepare(image)
    torch.testing.assert_close(x[:, 0], (image[:, 0] - 0.5) / 0.2)
    video = torch.stack([x, x], dim=1)  # [B, 2, 3, S, S]
    states = [theirs.encoder.embeddings(video)]
    for block in theirs.encoder.layer:
        states.append(block(states[-1])[0])
    final = theirs.encoder.layernorm if norm else nn.Identity()
    expected = torch.cat([final(states[layer]) for layer in (0, 1, -1)], dim=-1)
    torch.testing.assert_close(encoder(image).tokens, expected, **TOLERANCE)
    last = theirs.get_vision_features(video)
    torch.testing.assert_close(encoder.embed_image(image), nn.functional.normalize(last.mean(1), dim=-1), **TOLERANCE)
    with pytest.raises(ValueError, match="28 pixels only"):
        encoder.set_image_size(42)


@torch.no_grad()
@pytest.mark.parametrize("side", [4, 6])
def test_i_jepa_embeds_by_the_mean_of_its_patches(side: int, hf_folder: Folder) -> None:
    folder = hf_folder("IJepaModel")
    theirs = transformers.IJepaModel.from_pretrained(folder).eval()
    image = torch.rand(2, 3, 7 * side, 7 * side)
    encoder = build_encoder(f"hf:{folder}", image_size=7 * side, layer=[0, 2])
    output = theirs(encoder.prepare(image), output_hidden_states=True, interpolate_pos_encoding=True)
    torch.testing.assert_close(encoder(image).tokens, torch.cat([output.hidden_states[k] for k in (0, 2)], -1), **TOLERANCE)
    pooled = nn.functional.normalize(output.last_hidden_state.mean(1), dim=-1)
    torch.testing.assert_close(encoder.embed_image(image), pooled, **TOLERANCE)


def test_naflex_is_refused_by_name(tmp_path: Path) -> None:
    transformers.Siglip2Config().save_pretrained(tmp_path)
    transformers.Siglip2ImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'siglip2'.*NaFlex.*siglip2-base-patch16-256"):
        build_encoder(f"hf:{tmp_path}", pretrained=False)


def test_siglips_texts_are_canonical_whatever_the_tokenizer_does(hf_folder: Folder) -> None:
    encoder = build_encoder(f"hf:{hf_folder('SiglipModel')}")
    plain = encoder.embed_text(["a photo of a dog", "red cat"])
    torch.testing.assert_close(encoder.embed_text(["A photo of a DOG!", " Red_cat. "]), plain, **TOLERANCE)
    clip = build_encoder(f"hf:{hf_folder('CLIPModel')}")
    assert not torch.allclose(clip.embed_text(["red cat"]), clip.embed_text(["Red cat"]))


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipVisionModel", "DINOv3ViTModel", "Aimv2VisionModel"])
@pytest.mark.parametrize("norm", [False, True])
def test_several_layers_stand_side_by_side_in_the_order_asked_for(kind: str, norm: bool, hf_folder: Folder) -> None:
    folder = hf_folder(kind)
    theirs = getattr(transformers, kind).from_pretrained(folder).eval()
    vision = getattr(theirs, "vision_model", theirs)
    encoder = build_encoder(f"hf:{folder}", layer=[-2, 0, 1], norm=norm)
    image = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        states = vision(encoder.prepare(image), output_hidden_states=True).hidden_states
        final = vision.get_submodule(FAMILIES[theirs.config.model_type].norm)
        expected = torch.cat([(final(states[layer]) if norm else states[layer])[:, -16:] for layer in (-2, 0, 1)], dim=-1)
    assert encoder.width == 72 and encoder.blocks == 2
    torch.testing.assert_close(encoder(image).tokens, expected, **TOLERANCE)
    assert torch.equal(build_encoder(**encoder.spec)(image).tokens, encoder(image).tokens)


@pytest.mark.parametrize("side", [4, 6])
def test_mae_sees_every_patch_in_its_place(side: int, hf_folder: Folder) -> None:
    """Compared with ViTModel, which is the same network without masking."""
    folder = hf_folder("ViTMAEModel")
    mae = transformers.ViTMAEModel.from_pretrained(folder)
    theirs = transformers.ViTModel(transformers.ViTConfig(**{**mae.config.to_dict(), "model_type": "vit"}), add_pooling_layer=False)
    theirs.load_state_dict(mae.state_dict())
    encoder = build_encoder(f"hf:{folder}", image_size=7 * side, layer=[1, -1])
    image = torch.rand(2, 3, 7 * side, 7 * side)
    with torch.no_grad():
        output = theirs.eval()(encoder.prepare(image), output_hidden_states=True, interpolate_pos_encoding=True)
    expected = torch.cat([output.hidden_states[layer][:, 1:] for layer in (1, -1)], dim=-1)
    torch.testing.assert_close(encoder(image).tokens, expected, **TOLERANCE)
    pooled = nn.functional.normalize(output.last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(encoder.embed_image(image), pooled, **TOLERANCE)


@pytest.mark.parametrize("side", [4, 6])
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher", "ViTMSNForImageClassification"])
def test_a_classifier_is_read_without_its_head_and_embeds_by_its_class_token(kind: str, side: int, tmp_path: Path) -> None:
    """The most downloaded ViT and DeiT are classifiers, which have no pooler."""
    theirs = getattr(transformers, kind)(getattr(transformers, kind).config_class(**VISION, **SIZES)).eval()
    theirs.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    encoder, image = build_encoder(f"hf:{tmp_path}", image_size=7 * side, layer=[0, -1, 1]), torch.rand(2, 3, 7 * side, 7 * side)
    with torch.no_grad():
        output = theirs.base_model(encoder.prepare(image), output_hidden_states=True, interpolate_pos_encoding=True)
    expected = torch.cat([output.hidden_states[layer][:, -side * side :] for layer in (0, -1, 1)], dim=-1)
    torch.testing.assert_close(encoder(image).tokens, expected, **TOLERANCE)
    own = nn.functional.normalize(output.last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(encoder.embed_image(image), own, **TOLERANCE)
    again = build_encoder(f"hf:{tmp_path}", pretrained=False)
    again.load_state_dict(encoder.state_dict())  # a checkpoint that holds the encoder's weights fits


OTHERS = {
    "timm_wrapper": ({"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {"tag": "a1_in1k"}}, "timm:hf-hub:"),
    "swin": ({"model_type": "swin"}, r"timm.list_models\(\)"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_of_another_backend_names_it(kind: str, tmp_path: Path) -> None:
    config, remedy = OTHERS[kind]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"'{kind}'.*{remedy}"):
        build_encoder(f"hf:{tmp_path}", pretrained=False)


def test_weights_for_another_task_are_left_out(tmp_path: Path, hf_folder: Folder) -> None:
    """MAE's decoder and a classifier: what Meta's and Google's folders on the hub hold besides the encoder."""
    mae = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**VISION, **SIZES, decoder_num_hidden_layers=1))
    classifier = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**VISION, **SIZES))
    for model, own in ((mae, mae.vit), (classifier, classifier.dinov2)):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        CLIPImageProcessor().save_pretrained(folder)
        tower = build_encoder(f"hf:{folder}").tower
        assert all(torch.equal(value, own.state_dict()[key]) for key, value in tower.state_dict().items())


PROCESSORS = {
    "crop 224 of 256": ("BitImageProcessor", {"size": {"shortest_edge": 256}, "crop_size": 224}, ("crop", "bicubic", 224, 256)),
    "crop 9 of 14": ("CLIPImageProcessor", {"size": {"shortest_edge": 14}, "crop_size": 9}, ("crop", "bicubic", 9, 14)),
    "crop 14 of a square of 20": (
        "DeiTImageProcessor",
        {"size": {"height": 20, "width": 20}, "crop_size": 14},
        ("squash", "bicubic", 14, 20),
    ),
    "squash": ("ViTImageProcessor", {"size": {"height": 96, "width": 96}}, ("squash", "bilinear", 96, 96)),
    "siglip": ("SiglipImageProcessor", {}, ("squash", "bicubic", 224, 224)),
    "lanczos": ("CLIPImageProcessor", {"resample": 1}, ("crop", "lanczos", 224, 224)),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_come_as_the_image_processor_makes_them(case: str, tmp_path: Path) -> None:
    kind, options, (fit, interpolation, size, scaled) = PROCESSORS[case]
    processor = getattr(transformers, kind)(**options)
    processor.save_pretrained(tmp_path)
    config = transformers.Dinov2Config(**VISION, image_size=size, patch_size=size)
    config.save_pretrained(tmp_path)
    encoder = build_encoder(f"hf:{tmp_path}", pretrained=False)
    seen = encoder.preprocessing
    assert (seen.fit, seen.interpolation, seen.centre) == (fit, interpolation, "floor")
    assert math.floor(seen.image_size / seen.crop_pct) == scaled
    image = Image.effect_noise((331, 257), 90).convert("RGB")
    slow = getattr(transformers, f"{kind}Pil")(**options)
    expected = slow(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    assert np.abs(encoder.pixels(image).numpy().astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("options", [{"do_center_crop": False}, {"do_resize": False}, {"crop_size": {"height": 224, "width": 200}}])
def test_processor_that_makes_no_square_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    transformers.CLIPImageProcessor(**options).save_pretrained(tmp_path)
    transformers.Dinov2Config(**VISION, **SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*no square"):
        build_encoder(f"hf:{tmp_path}", pretrained=False)


def test_aimv2_without_interpolation_takes_one_size(tmp_path: Path) -> None:
    transformers.Aimv2VisionConfig(**VISION, **SIZES, use_head=False).save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    encoder = build_encoder(f"hf:{tmp_path}", pretrained=False)
    assert encoder(torch.rand(1, 3, 28, 28)).tokens.shape == (1, 16, 24)
    with pytest.raises(ValueError, match="4x4.*6x6"):
        encoder.resize_to((6, 6))
    with pytest.raises(ValueError, match=str(tmp_path)):
        encoder.embed_image(torch.rand(1, 3, 28, 28))


def test_prefix_tokens(hf_folder: Folder) -> None:
    counts = {"CLIPModel": 1, "SiglipModel": 0, "Dinov2Model": 1, "Dinov2WithRegistersModel": 5, "DINOv3ViTModel": 3, "Aimv2Model": 0}
    for kind, count in counts.items():
        encoder = build_encoder(f"hf:{hf_folder(kind)}")
        tower = encoder.tower.get_submodule(encoder.family.tower)
        with torch.no_grad():
            length = tower(torch.rand(1, 3, 28, 28)).last_hidden_state.shape[1]
        assert encoder.prefix_tokens == count == length - 16


def test_statistics_come_from_the_folder(hf_folder: Folder) -> None:
    encoder = build_encoder(f"hf:{hf_folder('Dinov2Model')}")
    assert (encoder.mean, encoder.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert encoder.preprocessing.interpolation == "bicubic"


def test_random_weights_need_the_config_only(hf_folder: Folder) -> None:
    folder = Path(hf_folder("Dinov2Model"))
    weights = folder / "model.safetensors"
    weights.rename(folder.parent / "moved.safetensors")
    image = torch.rand(1, 3, 28, 28)
    random = build_encoder(f"hf:{folder}", pretrained=False)
    moved = build_encoder(f"hf:{folder}", weights=folder.parent / "moved.safetensors")
    assert not torch.equal(random(image).tokens, moved(image).tokens)
    with pytest.raises(ValueError, match=r"Dinov2Model.*weights=PATH"):
        build_encoder(f"hf:{folder}")


def test_missing_and_unexpected_keys_are_named(hf_folder: Folder) -> None:
    folder = Path(hf_folder("Dinov2Model"))
    state = load_file(folder / "model.safetensors")
    state["extra.weight"] = state.pop("layernorm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for options in ({}, {"weights": folder / "model.safetensors"}):
        with pytest.raises(ValueError) as error:
            build_encoder(f"hf:{folder}", **options)
        for part in (str(folder), "layernorm.weight", "extra.weight"):
            assert part in str(error.value)


def test_unknown_id_and_architecture_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nobody/no-such-model"):
        build_encoder("hf:nobody/no-such-model", pretrained=False)
    for config in (transformers.BertConfig(), transformers.Siglip2Config(), transformers.ConvNextConfig()):
        config.save_pretrained(tmp_path)
        transformers.CLIPImageProcessor().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"'{config.model_type}'.*dinov2"):
            build_encoder(f"hf:{tmp_path}", pretrained=False)


def test_folder_without_statistics_is_refused(hf_folder: Folder) -> None:
    folder = Path(hf_folder("Dinov2Model"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        build_encoder(f"hf:{folder}")


@pytest.mark.parametrize("std", [[0.2, 0.3, float("nan")], [0.2, 0.3, 0.0], [0.2, 0.3]])
def test_statistics_that_make_no_sense_are_refused(hf_folder: Folder, std: list[float]) -> None:
    folder = Path(hf_folder("Dinov2Model"))
    config = folder / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_std": std}))
    with pytest.raises(ValueError, match="std takes three finite numbers"):
        build_encoder(f"hf:{folder}")


def test_hook_is_gone_after_the_forward_pass(hf_folder: Folder) -> None:
    encoder = build_encoder(f"hf:{hf_folder('Dinov2Model')}", layer=1)
    before = hooks_of(encoder)
    encoder(torch.rand(1, 3, 28, 28))
    assert hooks_of(encoder) == before


@pytest.mark.parametrize("kind", ["SiglipModel", "CLIPModel"])
def test_siglip_reads_lower_case_whatever_its_tokenizer_does(kind: str, hf_folder: Folder) -> None:
    """SigLIP 2 has Gemma's tokenizer, which keeps capitals, and was trained on lower-case texts."""
    encoder = build_encoder(f"hf:{hf_folder(kind)}")
    texts = ["A photo of a RED dog </s>", "a photo of a red dog </s>"]
    one, other = encoder.embed_text(texts) if kind == "SiglipModel" else (encoder.embed_text([text])[0] for text in texts)
    assert torch.equal(one, other) == (kind == "SiglipModel"), "the tokenizer of these folders keeps capitals"
