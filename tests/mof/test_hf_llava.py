"""Hugging Face LLaVA in: logits, generation, ids and pixels equal transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from packaging.version import Version
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from support.tiny_checkpoints import write_hf_llava
from transformers import AutoProcessor, LlamaConfig, LlavaForConditionalGeneration, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from encoders import Encoder
from mof import InterleavedMoF
from mof.llava.loading import load_checkpoint, save_checkpoint
from mof.llava.tower_export import refuse_pooled

NOISE = Image.effect_noise((90, 120), 200).convert("RGB").filter(ImageFilter.GaussianBlur(2))
IMAGES = [NOISE.crop((0, 0, *size)) for size in ((60, 40), (28, 28), (56, 102))]
PROMPTS = ["USER: <image>\nWhat? ASSISTANT:", "USER: <image> and <image>\nWhich of these two? ASSISTANT:", "No image."]


def same_as_transformers(folder: Path, tolerance: float = 1e-4) -> None:
    """The converted model and processor against transformers' own, on a padded batch of one, two and no images."""
    reference, processor = LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"  # ours always does; the side is no part of the weights
    loaded = load_checkpoint(folder)
    options = {"images": IMAGES, "text": PROMPTS, "padding": True, "return_tensors": "pt"}
    theirs, ours = processor(**options), loaded.processor(**options)
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(theirs[key], ours[key]), key
    statistics = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (statistics.image_mean, statistics.image_std))
    grey = (theirs["pixel_values"] * std + mean) * 255
    assert (grey - ours["pixel_values"].float()).abs().max() < 1.01
    exact = (ours["pixel_values"].float() / 255 - mean) / std  # both models look at the same pixels
    with torch.no_grad():
        expected = reference(**{**theirs, "pixel_values": exact.to(reference.dtype)}).logits
        actual = loaded.model(**ours).logits
    kept = ours["attention_mask"].bool()
    assert expected.float().std() > 0.1
    assert (expected - actual)[kept].abs().max() < tolerance
    chosen = {"do_sample": False, "max_new_tokens": 8}
    written = reference.generate(
        **{**theirs, "pixel_values": exact.to(reference.dtype)}, suppress_tokens=[reference.config.image_token_id], **chosen
    )
    assert torch.equal(written, loaded.model.generate(**ours, **chosen))


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_logits_and_generation(vision: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_hf_llava(tmp_path, tiny_tokenizer, vision=vision)
    same_as_transformers(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        partial(Qwen2Config, num_key_value_heads=4),
        partial(LlamaConfig, tie_word_embeddings=True),
        partial(LlamaConfig, num_key_value_heads=2),
    ],
)
def test_other_language_models(text: Callable[..., PretrainedConfig], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = write_hf_llava(tmp_path / "in", tiny_tokenizer, text=text)
    same_as_transformers(tmp_path / "in")
    save_checkpoint(load_checkpoint(tmp_path / "in"), tmp_path / "out", "hf-llava")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    assert load_file(tmp_path / "in" / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()


@pytest.mark.parametrize("layer", [-1, -3, 2, [-2], [-2, 1]])
def test_feature_layer(layer: int | list[int], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_hf_llava(tmp_path, tiny_tokenizer, vision_feature_layer=layer)
    same_as_transformers(tmp_path)


LANCZOS = pytest.param(
    {"resample": 1},
    marks=pytest.mark.skipif(
        Version(torchvision.__version__) < Version("0.27"), reason="transformers takes bicubic in place of Lanczos before torchvision 0.27"
    ),
)


@pytest.mark.parametrize("changes", [{"resample": 2}, {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}, LANCZOS])
def test_fits_and_filters(changes: dict[str, object], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Filters, padding, and (in all of them) 51 rows of which 28 are kept: the half row goes where transformers puts it."""
    write_hf_llava(tmp_path, tiny_tokenizer)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (tmp_path / name).is_file():
            config = json.loads((tmp_path / name).read_text())
            config.get("image_processor", config).update(changes)
            (tmp_path / name).write_text(json.dumps(config))
    same_as_transformers(tmp_path)


def test_tokens_that_no_layout_describes_are_refused(tiny_encoders: dict[str, Encoder]) -> None:
    refuse_pooled(InterleavedMoF(tiny_encoders, 8))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        refuse_pooled(InterleavedMoF(tiny_encoders, 8, pool=2))
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(4, 2\)"):  # rectangles are interpolated
        refuse_pooled(InterleavedMoF(tiny_encoders, 8, grid=(4, 2)))
    with pytest.raises(ValueError, match="a, b"):
        refuse_pooled(InterleavedMoF(tiny_encoders, 8, weigh_layers=True))
