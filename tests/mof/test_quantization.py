"""Loading in 8 and 4 bits with a plain config: the language model's layers shrink, and adapters, encoders and head stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import build_llm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedTokenizerFast, TorchAoConfig

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


def layers_of(model: torch.nn.Module) -> set[str]:
    """The names of linear layers in the language model, without its head."""
    return {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers." in name and "mixer" not in name
    }


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


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_language_model_makes_a_quantized_model(
    bits: int, model: MoFForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    model.language_model.save_pretrained(tmp_path / "llm")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", quantization_config=BITS[bits], device_map="cpu")
    joined = MoFForConditionalGeneration.from_parts(model.mixer, llm, tiny_tokenizer).eval()
    joined.save_pretrained(tmp_path / "small")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "small", device_map="cpu")
    assert {type(module) for name, module in loaded.named_modules() if name in layers_of(loaded)} == {type(llm.model.layers[0].mlp.up_proj)}
    batch = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, joined(**batch).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_low_rank_adapters_on_quantized_layers(bits: int, model: MoFForConditionalGeneration, tmp_path: Path) -> None:
    """QLoRA: only the adapters change, the loss falls, and the adapters on the same quantized model give the same loss again."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    model.save_pretrained(tmp_path / "whole")
    batch = inputs(model) | {"labels": torch.tensor([[-100] * (1 + model.mixer.tokens_per_image) + [6, 7]])}

    def load() -> MoFForConditionalGeneration:
        return AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", quantization_config=BITS[bits], device_map="cpu")

    wrapped = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(load()), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trained and all("lora" in name and "language_model" in name for name in trained)
    optimizer = torch.optim.AdamW([parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=1e-2)
    wrapped.train()
    losses = []
    for _ in range(8):
        loss = wrapped(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    wrapped.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapters")
    with torch.no_grad():
        assert again.train()(**batch).loss.item() == pytest.approx(wrapped(**batch).loss.item(), rel=1e-2)


@pytest.mark.parametrize("embedded", [False, True])
def test_int8_of_torchao(embedded: bool, model: MoFForConditionalGeneration, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model.config.embed_encoders = embedded
    model.save_pretrained(tmp_path / "whole")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", quantization_config=config, device_map="cpu")
    small = {name for name, module in loaded.named_modules() if "Int8" in type(getattr(module, "weight", None)).__name__}
    assert small == layers_of(model)
    loaded.save_pretrained(tmp_path / "small")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    batch = inputs(model)
    with torch.no_grad():
        expected, actual = model(**batch).logits, loaded(**batch).logits
        assert torch.equal(again(**batch).logits, actual)
    assert torch.nn.functional.cosine_similarity(expected.flatten(), actual.flatten(), 0) > 0.99
