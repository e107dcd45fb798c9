"""Loading in 8 and 4 bits with a plain config: the language model's layers shrink, and adapters, encoders and head stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import build_llm
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedTokenizerFast

from encoders import build_encoder
from mof import InterleavedMoF, MoFForConditionalGeneration
from mof.quantization import language_model_only

BITS = {8: BitsAndBytesConfig(load_in_8bit=True), 4: BitsAndBytesConfig(load_in_4bit=True)}


@pytest.fixture
def model(tiny_tokenizer: PreTrainedTokenizerFast) -> MoFForConditionalGeneration:
    """A model with an encoder that has linear layers, and with widths that 4 bits can have."""
    mixer = InterleavedMoF({"a": build_encoder("tiny-a"), "dino": build_encoder("mini-dino")}, hidden_size=64)
    llm = build_llm(tiny_tokenizer, hidden_size=64, intermediate_size=128)
    return MoFForConditionalGeneration.from_parts(mixer, llm, tiny_tokenizer).eval()


def inputs(model: MoFForConditionalGeneration) -> dict[str, torch.Tensor]:
    image = [model.config.image_token_id] * model.mixer.tokens_per_image
    return {"input_ids": torch.tensor([[5, *image, 6, 7]]), "pixel_values": torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)}


@pytest.mark.parametrize("bits", BITS)
def test_what_is_left_out(bits: int, model: MoFForConditionalGeneration) -> None:
    plain = BITS[bits]
    assert {"mixer", "language_model.lm_head"} <= set(language_model_only(plain, model).llm_int8_skip_modules)
    assert plain.llm_int8_skip_modules is None  # the caller's config stays as it is
    given = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["up_proj"])
    for config in (given, given.to_dict()):
        assert language_model_only(config, model).llm_int8_skip_modules == ["mixer", "up_proj"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("embedded", [False, True])
def test_a_plain_config_loads_and_answers(bits: int, embedded: bool, model: MoFForConditionalGeneration, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model.config.embed_encoders = embedded
    model.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", quantization_config=BITS[bits], device_map="cpu")
    kind = bitsandbytes.nn.Linear8bitLt if bits == 8 else bitsandbytes.nn.Linear4bit
    small = {name for name, module in loaded.named_modules() if isinstance(module, kind)}
    layers = {name for name, module in model.language_model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert small == {f"language_model.model.{name}" for name in layers}
    for key, value in model.mixer.state_dict().items():
        assert torch.equal(loaded.mixer.state_dict()[key], value), key
    loaded.save_pretrained(tmp_path / "small")  # first, as bitsandbytes packs 4 bits anew when a CPU multiplies
    batch = inputs(model)
    with torch.no_grad():
        expected, actual = model(**batch).logits, loaded(**batch).logits
    assert torch.nn.functional.cosine_similarity(expected.flatten(), actual.float().flatten(), 0) > {8: 0.99, 4: 0.8}[bits]
    assert loaded.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] <= batch["input_ids"].shape[1] + 2
    with torch.no_grad():
        again = MoFForConditionalGeneration.from_pretrained(tmp_path / "small", device_map="cpu")(**batch).logits
    torch.testing.assert_close(again, actual, atol=1e-3, rtol=1e-3)
