"""LoRA folders: merged by hand from the definition W + (alpha / r) B A, then compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny_checkpoints import build_parts, llava_state, prefixed, write_clip, write_original
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from encoders.weight_files import WeightsError
from mof import MoFForConditionalGeneration, MoFProcessor
from mof.llava.loading import load_checkpoint

RANK, ALPHA = 4, 8


@pytest.fixture
def parts(tiny_tokenizer: PreTrainedTokenizerFast) -> dict:
    return build_parts(tiny_tokenizer)


def adapter(model: torch.nn.Module) -> dict[str, Tensor]:
    """Random LoRA weights for the queries and the MLP of a Llama, by peft's names."""
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith(("layers.0.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight")):
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            state[f"{stem}.lora_A.weight"] = torch.randn(RANK, value.shape[1]) * 0.1
            state[f"{stem}.lora_B.weight"] = torch.randn(value.shape[0], RANK) * 0.1
    return state


def merged(model: torch.nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {key: value.clone() for key, value in model.state_dict().items()}
    for key in state:
        if key.endswith("lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            result[f"{stem.removeprefix('base_model.model.')}.weight"] += ALPHA / RANK * state[f"{stem}.lora_B.weight"] @ state[key]
    return result


def write_adapter(folder: Path, state: dict[str, Tensor], targets: list[str], ending: str = ".safetensors") -> None:
    folder.mkdir(exist_ok=True)
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors") if ending == ".safetensors" else torch.save(state, folder / "adapter_model.bin")


TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_llava_lora(ending: str, parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """adapter, config.json and non_lora_trainables.bin in one folder, the language model in another."""
    write_clip(tmp_path / "clip", parts["clip"])
    parts["llama"].save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    state, folder = adapter(parts["llama"]), tmp_path / "lora"
    write_original(folder, tiny_tokenizer, {})
    write_adapter(folder, state, TARGETS, ending)
    torch.save(prefixed("base_model.model.model.mm_projector.", parts["projector"]), folder / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match="base=FOLDER.*--base"):
        load_checkpoint(folder)
    model = load_checkpoint(folder, base=tmp_path / "llama", vision_tower=tmp_path / "clip").model
    for key, value in merged(parts["llama"], state).items():
        own = model.language_model.state_dict()[key]
        assert torch.allclose(own[: len(value)], value, atol=1e-6), key
    assert torch.equal(model.mixer.adapters["clip"][2].weight, parts["projector"]["2.weight"])
    write_original(
        tmp_path / "whole", tiny_tokenizer, llava_state({**parts, "projector": {k: v + 1 for k, v in parts["projector"].items()}})
    )
    on_llava = load_checkpoint(folder, base=tmp_path / "whole").model  # what was trained beside the LoRA replaces the base's
    assert torch.equal(on_llava.mixer.adapters["clip"][2].weight, parts["projector"]["2.weight"])


def test_llava_lora_of_embeddings_and_head(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The adapter was trained without a row for the image token; that row is the mean of the merged rows."""
    write_clip(tmp_path / "clip", parts["clip"])
    write_original(tmp_path / "base", tiny_tokenizer, llava_state(parts))
    write_original(tmp_path / "lora", tiny_tokenizer, {})
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
    wrapped = get_peft_model(copy.deepcopy(parts["llama"]), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path / "lora")
    loaded = load_checkpoint(tmp_path / "lora", base=tmp_path / "base", vision_tower=tmp_path / "clip")
    actual = loaded.model.language_model.state_dict()
    for key, value in wrapped.merge_and_unload().state_dict().items():
        rows = torch.cat([value, value.mean(dim=0, keepdim=True)]) if len(actual[key]) > len(value) else value
        assert torch.allclose(actual[key], rows, atol=1e-6), key
    tables = [actual["model.embed_tokens.weight"], actual["lm_head.weight"]]
    assert [len(table) for table in tables] == [len(parts["llama"].lm_head.weight) + 1] * 2
    assert not torch.allclose(tables[0][:-1], parts["llama"].get_input_embeddings().weight)


def test_own_lora(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, tmp_path: Path) -> None:
    """peft saved the adapter of a model of this library."""
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_processor.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "up_proj"], modules_to_save=["adapters.a", "adapters.b"])
    wrapped = get_peft_model(tiny_model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path / "lora")
    loaded = load_checkpoint(tmp_path / "lora", base=tmp_path / "base")
    expected = wrapped.merge_and_unload().state_dict()
    actual = loaded.model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(actual[key], expected[key], atol=1e-6) for key in expected)
    assert not torch.equal(
        actual["mixer.adapters.a.0.weight"], MoFForConditionalGeneration.from_pretrained(tmp_path / "base").mixer.adapters["a"][0].weight
    )


def test_adapters_that_do_not_fit(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_processor.save_pretrained(tmp_path / "base")
    good, targets = adapter(tiny_model), ["language_model." + name for name in TARGETS]
    first = next(iter(good))
    cases = [
        (good | {first.replace("lora_A", "lora_C"): good[first].clone()}, "1 unexpected: .*lora_C"),
        ({key: value for key, value in good.items() if key != first}, f"1 missing: {first.removesuffix('.weight')}"),
        (good | {first: good[first][:, :-1].contiguous()}, "size mismatch"),
    ]
    for number, (state, match) in enumerate(cases):
        write_adapter(tmp_path / str(number), state, targets)
        with pytest.raises(WeightsError, match=match):
            load_checkpoint(tmp_path / str(number), base=tmp_path / "base")
    (tmp_path / "0" / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="adapter_model.safetensors.*adapter_model.bin"):
        load_checkpoint(tmp_path / "0", base=tmp_path / "base")
    (tmp_path / "0" / "adapter_config.json").write_text(json.dumps({"peft_type": "NONSENSE"}))
    (tmp_path / "0" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError):
        load_checkpoint(tmp_path / "0", base=tmp_path / "base")
    assert load_file(tmp_path / "1" / "adapter_model.safetensors")
