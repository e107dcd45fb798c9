"""Saving and loading: bit-equal, strict, with encoders by reference or inside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny import build_llm, build_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from encoders import build_encoder
from encoders.digests import DamagedError
from mof import AdditiveMoF, InterleavedMoF, MoFConfig, MoFForConditionalGeneration, MoFProcessor

RED = Image.new("RGB", (32, 32), (200, 0, 0))


@pytest.fixture
def inputs(tiny_processor: MoFProcessor) -> dict[str, Tensor]:
    return dict(tiny_processor(images=[RED], text="<image>What?", return_tensors="pt"))


def assert_equal(model: MoFForConditionalGeneration, loaded: MoFForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    """Check that both models are equal bit for bit: parameters, buffers (saved or not), modes and logits."""
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]), key
    buffers = dict(loaded.named_buffers())
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_equal(
    embed: bool, dtype: torch.dtype, tied: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build_model(tiny_tokenizer, build_llm(tiny_tokenizer, dtype, tie_word_embeddings=tied))
    model.config.embed_encoders = embed
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert any(key.startswith("mixer.encoders.") for key in keys) == embed
    assert any(key.startswith("mixer.adapters.") for key in keys)
    loaded = MoFForConditionalGeneration.from_pretrained(tmp_path)
    processor = MoFProcessor.from_parts(loaded, tiny_tokenizer)
    assert_equal(model, loaded, dict(processor(images=[RED], text="<image>What?", return_tensors="pt")))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.generation_config.suppress_tokens == [model.config.image_token_id]


def test_embedded_encoders_come_from_the_file(tiny_model: MoFForConditionalGeneration, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    """Weights that no spec could rebuild."""
    with torch.no_grad():
        for parameter in tiny_model.mixer.encoders.parameters():
            parameter.mul_(1.5)
    tiny_model.config.embed_encoders = True
    tiny_model.save_pretrained(tmp_path)
    assert_equal(tiny_model, MoFForConditionalGeneration.from_pretrained(tmp_path), inputs)


def test_trained_encoders_must_be_embedded(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    encoders = {"a": build_encoder("tiny-a", trainable=True), "b": build_encoder("tiny-a", image_size=40)}
    mixer = AdditiveMoF(encoders, 32, weights={"a": 0.25, "b": 0.75}, pool=2)
    with pytest.raises(ValueError, match=r"\['a'\].*embed_encoders=True"):
        MoFForConditionalGeneration.from_parts(mixer, build_llm(tiny_tokenizer), tiny_tokenizer)
    model = MoFForConditionalGeneration.from_parts(mixer, build_llm(tiny_tokenizer), tiny_tokenizer, embed_encoders=True)
    model.eval().save_pretrained(tmp_path)
    loaded = MoFForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(loaded.mixer, AdditiveMoF) and loaded.mixer.weights == {"a": 0.25, "b": 0.75}
    assert loaded.mixer.encoders["a"].tower[0].weight.requires_grad
    assert not loaded.mixer.encoders["b"].tower[0].weight.requires_grad
    processor = MoFProcessor.from_parts(loaded, tiny_tokenizer)
    assert_equal(model, loaded, dict(processor(images=[RED], text="<image>What?", return_tensors="pt")))


def test_auto_classes_and_options(tiny_model: MoFForConditionalGeneration, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoFConfig)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    assert isinstance(loaded, MoFForConditionalGeneration)
    assert loaded.language_model.config._attn_implementation == "eager"
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    again, info = MoFForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal(tiny_model, again, inputs)


def test_sharded_checkpoint(tiny_model: MoFForConditionalGeneration, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_equal(tiny_model, MoFForConditionalGeneration.from_pretrained(tmp_path), inputs)


def test_llm_whose_checkpoints_are_stored_otherwise(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Mixtral's experts are one tensor in memory and many in the file."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=len(tiny_tokenizer), num_key_value_heads=2, num_local_experts=2, **sizes)
    model = build_model(tiny_tokenizer, AutoModelForCausalLM.from_config(config).eval())
    model.save_pretrained(tmp_path)
    processor = MoFProcessor.from_parts(model, tiny_tokenizer)
    inputs = dict(processor(images=[RED], text="<image>What?", return_tensors="pt"))
    assert_equal(model, MoFForConditionalGeneration.from_pretrained(tmp_path), inputs)


@pytest.mark.parametrize("embed", [False, True])
def test_encoders_of_real_libraries(embed: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Their towers hold buffers that are never saved, and (transformers) models within the model."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    for name, config in {"dino": Dinov2Config(**sizes), "clip": CLIPVisionConfig(**sizes, intermediate_size=32)}.items():
        AutoModel.from_config(config).save_pretrained(tmp_path / name)
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path / name)
    encoders = {name: build_encoder(f"hf:{tmp_path / name}", layer=-1) for name in ("dino", "clip")}
    if embed:  # random, so no reference could give it back
        encoders["timm"] = build_encoder("timm:vit_tiny_patch16_224", pretrained=False, image_size=32)
    mixer = InterleavedMoF(encoders, 32)
    llm = build_llm(tiny_tokenizer)
    model = MoFForConditionalGeneration.from_parts(mixer, llm, tiny_tokenizer, embed_encoders=embed).eval()
    model.save_pretrained(tmp_path / "model")
    processor = MoFProcessor.from_parts(model, tiny_tokenizer)
    inputs = dict(processor(images=[RED], text="<image>What?", return_tensors="pt"))
    assert_equal(model, MoFForConditionalGeneration.from_pretrained(tmp_path / "model"), inputs)


def test_stray_keys_are_listed(tiny_model: MoFForConditionalGeneration, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["mixer.dino_mm_projector.0.bias"] = state.pop("mixer.adapters.b.0.bias")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedError, match=r"model\.safetensors.*delete .*digests\.json"):
        MoFForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "digests.json").unlink()
    with pytest.raises(ValueError) as error:
        MoFForConditionalGeneration.from_pretrained(tmp_path)
    assert "1 missing: mixer.adapters.b.0.bias; 1 unexpected: mixer.dino_mm_projector.0.bias" in str(error.value)


def test_encoder_weights_in_a_checkpoint_that_should_not_have_them(tiny_model: MoFForConditionalGeneration, tmp_path: Path) -> None:
    tiny_model.config.embed_encoders = True
    tiny_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "embed_encoders": False}))
    (tmp_path / "digests.json").unlink()
    with pytest.raises(ValueError, match=r"4 unexpected: mixer.encoders.a.tower.0.bias, "):
        MoFForConditionalGeneration.from_pretrained(tmp_path)


def test_order_of_fusion_survives_the_config_file(tmp_path: Path) -> None:
    """config.json sorts its keys; interleaving by the alphabet would exchange the encoders' slots."""
    MoFConfig(encoders={"z": {"name": "tiny-a"}, "a": {"name": "tiny-b"}}).save_pretrained(tmp_path)
    assert list(MoFConfig.from_pretrained(tmp_path).encoders) == ["z", "a"]
    with pytest.raises(ValueError, match=r"\['z'\].*\['a', 'z'\]"):
        MoFConfig(encoders={"z": {}, "a": {}}, encoder_order=["z"])


def test_config_round_trip(tiny_model: MoFForConditionalGeneration, tmp_path: Path) -> None:
    tiny_model.config.save_pretrained(tmp_path)
    loaded = MoFConfig.from_pretrained(tmp_path)
    for name in ("encoders", "fusion", "fusion_options", "image_token_id", "embed_encoders"):
        assert getattr(loaded, name) == getattr(tiny_model.config, name), name
    assert loaded.text_config.to_diff_dict() == tiny_model.config.text_config.to_diff_dict()
    assert loaded.get_text_config() is loaded.text_config


def test_one_encoder_under_two_names_is_refused_before_its_weights_would_be_lost(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    encoder = build_encoder("tiny-a")
    mixer = AdditiveMoF({"a": encoder, "b": encoder}, 32)
    model = MoFForConditionalGeneration.from_parts(mixer, build_llm(tiny_tokenizer), tiny_tokenizer)
    model.save_pretrained(tmp_path)  # by reference, each name builds its own
    assert list(MoFForConditionalGeneration.from_pretrained(tmp_path).mixer.encoders) == ["a", "b"]
    with pytest.raises(ValueError, match="'a' and 'b' are the same object"):
        MoFForConditionalGeneration.from_parts(mixer, build_llm(tiny_tokenizer), tiny_tokenizer, embed_encoders=True)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_of_a_folder_is_kept(name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    build_model(tiny_tokenizer, build_llm(tiny_tokenizer, dtype=torch.bfloat16)).save_pretrained(tmp_path)
    assert MoFForConditionalGeneration.from_pretrained(tmp_path, **{name: "auto"}).dtype == torch.bfloat16
    assert MoFForConditionalGeneration.from_pretrained(tmp_path, **{name: torch.float32}).dtype == torch.float32


@torch.no_grad()
def test_the_base_model_opens_the_same_folder(
    tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, tmp_path: Path
) -> None:
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    batch = tiny_processor(images=[pixels], text="<image>What?", return_tensors="pt")
    tiny_model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    hidden = base.eval()(**batch).last_hidden_state
    assert torch.equal(hidden, tiny_model.base_model(**batch).last_hidden_state)
    torch.testing.assert_close(tiny_model.get_output_embeddings()(hidden), tiny_model(**batch).logits)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "base").eval()(**batch).last_hidden_state, hidden)
    assert "_name_or_path" not in (tmp_path / "whole" / "config.json").read_text()
