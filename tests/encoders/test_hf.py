"""The transformers backend against transformers itself, on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from encoders import build_encoder
from encoders.hf_backend import FAMILIES

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
KINDS = [family.model for family in FAMILIES.values()]
Folder = Callable[[str], str]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [4, 6])
def test_features_equal_transformers_at_any_size(kind: str, side: int, hf_folder: Folder) -> None:
    folder = hf_folder(kind)
    theirs = getattr(transformers, kind).from_pretrained(folder).eval()
    vision = getattr(theirs, "vision_model", theirs)
    image = torch.rand(2, 3, 7 * side, 7 * side)
    for layer in range(-4, 4):
        encoder = build_encoder(f"hf:{folder}", image_size=7 * side, layer=layer)
        x = encoder.prepare(image)
        interpolate = {"interpolate_pos_encoding": True} if encoder.family.positions else {}
        with torch.no_grad():
            output = vision(x, output_hidden_states=True, **interpolate)
        expected = output.hidden_states[layer][:, -side * side :]
        torch.testing.assert_close(encoder(image).tokens, expected, **TOLERANCE)
    pooled = output.pooler_output
    if kind == "CLIPModel":
        pooled = theirs.visual_projection(pooled)
    torch.testing.assert_close(encoder.embed_image(image), nn.functional.normalize(pooled, dim=-1), **TOLERANCE)


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_text_equals_transformers(kind: str, hf_folder: Folder) -> None:
    folder = hf_folder(kind)
    theirs = getattr(transformers, kind).from_pretrained(folder).eval()
    texts = ["a photo of a dog </s>", "red cat </s>"]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", max_length=8, return_tensors="pt")
    image = torch.rand(2, 3, 28, 28)
    encoder = build_encoder(f"hf:{folder}")
    with torch.no_grad():
        output = theirs(**tokens, pixel_values=encoder.prepare(image))
    torch.testing.assert_close(encoder.embed_text(texts), output.text_embeds, **TOLERANCE)
    torch.testing.assert_close(encoder.embed_image(image), output.image_embeds, **TOLERANCE)


def test_statistics_come_from_the_folder(hf_folder: Folder) -> None:
    encoder = build_encoder(f"hf:{hf_folder('Dinov2Model')}")
    assert (encoder.mean, encoder.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert encoder.interpolation == "bicubic"


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
    transformers.BertConfig().save_pretrained(tmp_path)
    transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert'.*dinov2"):
        build_encoder(f"hf:{tmp_path}", pretrained=False)


def test_folder_without_statistics_is_refused(hf_folder: Folder) -> None:
    folder = Path(hf_folder("Dinov2Model"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        build_encoder(f"hf:{folder}")


def test_hook_is_gone_after_the_forward_pass(hf_folder: Folder) -> None:
    encoder = build_encoder(f"hf:{hf_folder('Dinov2Model')}", layer=1)
    encoder(torch.rand(1, 3, 28, 28))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
