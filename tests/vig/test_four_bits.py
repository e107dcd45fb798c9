"""QLoRA by `mof train`: the language model is in 4 bits while low-rank adapters train, and the result is a whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import families
from support.commands import mof
from support.tiny import build_llm
from support.tiny_llava import build_llava, build_records
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlamaConfig, LlavaForConditionalGeneration
from typer.testing import Result

from encoders import build_encoder
from encoders.saved_models import load_network, load_processor
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFProcessor
from study.memory import FOUR_BITS
from vig import saved_models
from vig.saved_models import load_in_4bit
from vig.training.finetuning import training_file

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # 4 bits on a CPU need multiples of 64
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
needs_bitsandbytes = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('bitsandbytes')", reason="needs bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four-bits")
    model, processor = build_llava()
    model.config.text_config = LlamaConfig(**model.config.text_config.to_dict() | SIZES)
    torch.manual_seed(0)
    saved(LlavaForConditionalGeneration(model.config), processor, folder / "model")
    (folder / "records.json").write_text(json.dumps(build_records(folder / "images", 8)))
    return folder


def saved(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(folder: Path, out: Path, *more: object, model: Path | None = None) -> Result:
    words = ["train", "--model", model or folder / "model", "--records", folder / "records.json", "--images", folder / "images"]
    words += ["--output", out, "--batch-size", 1, "--accumulate", 1, "--learning-rate", 0.01, "--set", "dataloader_num_workers=0", *more]
    return mof(*words)


def trained(*args: Any, **options: Any) -> dict[str, torch.Tensor]:
    result = run(*args, **options)
    assert result.exit_code == 0, result.output
    return load_file(args[1] / "model.safetensors")


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert before.keys() == after.keys() and all(after[name].dtype == before[name].dtype for name in before)
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}


@needs_bitsandbytes
def test_the_result_is_the_whole_model_with_matrices_moved_by_the_rank(folder: Path, tmp_path: Path) -> None:
    before = load_file(folder / "model/model.safetensors")
    small = moved(before, trained(folder, tmp_path / "small", "--lora", 2, "--load-in-4bit", "--gradient-checkpointing", "--epochs", 3))
    plain = moved(before, trained(folder, tmp_path / "plain", "--lora", 2, "--epochs", 3))
    assert small.keys() == plain.keys() == {name for name in before if "language_model" in name and name.split(".")[-2] in LINEAR}
    for name, change in small.items():
        values = torch.linalg.svdvals(change)
        assert values[2] < 1e-5 < values[0]
        # The adapters start from the same numbers, and see a language model that is rounded to 4 bits.
        assert 1e-4 < (change - plain[name]).norm() / plain[name].norm() < 1.4, name
    losses = [json.loads((tmp_path / name / "training.json").read_text())["result"]["losses"] for name in ("small", "plain")]
    assert losses[0] != losses[1] and all(sum(run[-8:]) < sum(run[:8]) for run in losses)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    assert getattr(model.config, "quantization_config", None) is None


@needs_bitsandbytes
def test_killed_and_resumed_is_the_undisturbed_run(folder: Path, tmp_path: Path) -> None:
    """Also after evaluations, which would make layers of bitsandbytes on a CPU pass no gradient on."""
    (tmp_path / "others.json").write_text(json.dumps(build_records(folder / "images", 10)[8:]))
    more = (
        "--lora",
        2,
        "--load-in-4bit",
        "--eval-records",
        tmp_path / "others.json",
        "--set",
        "save_steps=2",
        "--set",
        "save_total_limit=9",
        "--set",
        "lr_scheduler_type=constant",
    )
    whole = trained(folder, tmp_path / "out", *more)
    before = json.loads((tmp_path / "out/training.json").read_text())
    training_file(tmp_path / "out").write(before["identity"])
    (tmp_path / "out/model.safetensors").unlink()
    for step in (4, 6, 8):
        shutil.rmtree(tmp_path / f"out/checkpoints/checkpoint-{step}")
    again = trained(folder, tmp_path / "out", *more)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    refused(run(folder, tmp_path / "out", *more[:2]), "load_in_4bit")


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["mof", "qwen2_5_vl", "smolvlm", "llava_onevision"])
def test_the_language_model_alone_is_in_4_bits(kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    import bitsandbytes

    if kind == "mof":
        mixer = InterleavedMoF({"a": build_encoder("tiny-a"), "dino": build_encoder("mini-dino")}, hidden_size=64)
        model = MoFForConditionalGeneration.from_parts(mixer, build_llm(tiny_tokenizer, **SIZES), tiny_tokenizer)
        saved(model, MoFProcessor.from_parts(model, tiny_tokenizer), tmp_path / "model")
    else:
        model = saved_family(kind, tmp_path / "model")
    load_processor(tmp_path / "model")
    small, whole = load_in_4bit(tmp_path / "model"), load_network(tmp_path / "model")
    four = {name for name, module in small.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    decoder = set(whole.get_decoder().modules())
    assert four == {name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear) and module in decoder}
    parameters = dict(small.named_parameters())
    for name, parameter in whole.named_parameters():
        assert (parameters[name].dtype == torch.uint8) == (name.removesuffix(".weight") in four)
        assert name.removesuffix(".weight") in four or torch.equal(parameters[name], parameter)


@needs_bitsandbytes
def test_float16_becomes_bfloat16(folder: Path, tmp_path: Path) -> None:
    model, processor = load_network(folder / "model"), load_processor(folder / "model")
    half = saved(model.half(), processor, tmp_path / "half")
    after = trained(folder, tmp_path / "out", "--lora", 2, "--load-in-4bit", "--set", "max_steps=2", model=half)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    before = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    assert {name.split(".")[-2] for name in moved(before, after)} == set(LINEAR)


@needs_bitsandbytes
def test_a_parameter_takes_the_bytes_of_the_plan() -> None:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(1024, 1024, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    state = {name: tensor for name, tensor in layer.state_dict().items() if not name.endswith(("quant_map", "bitsandbytes__nf4"))}
    assert sum(tensor.nbytes for tensor in state.values()) == FOUR_BITS * 1024**2


def saved_family(kind: str, folder: Path) -> Any:
    model, processor = families.build(kind)
    saved(model, processor, folder)
    return model


def refused(result: Result, *words: str) -> None:
    assert result.exit_code != 0 and isinstance(result.exception, (ValueError, SystemExit)), result.output
    said = f"{result.output} {result.exception}"
    assert all(word in said for word in words), said


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run(folder, tmp_path / "a", "--load-in-4bit"), "--lora RANK")
    config = json.loads((folder / "model/config.json").read_text())
    shutil.copytree(folder / "model", tmp_path / "small")
    config["quantization_config"] = {**BitsAndBytesConfig(load_in_4bit=True).to_dict(), "quant_method": "bitsandbytes"}
    (tmp_path / "small/config.json").write_text(json.dumps(config))
    for path in (tmp_path / "small").glob("*digests*"):
        path.unlink()
    monkeypatch.setattr(saved_models, "find_spec", lambda name: None)
    refused(run(folder, tmp_path / "a", "--lora", 2, "--load-in-4bit"), "mof-vig[quantized]")
    monkeypatch.setattr(saved_models, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="small is quantized already"):
        load_in_4bit(tmp_path / "small")
