"""Training: where gradients go, and that checkpointing, LoRA, bf16 and two processes do not change the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import launch, train_curve
from support.tiny import build_llm, build_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from mof import MoFForConditionalGeneration, MoFProcessor
from mof.data.collator import SupervisedCollator


def record(index: int, image: bool = True) -> dict[str, Any]:
    question = {"from": "human", "value": "<image>\nWhich?" if image else "Which?"}
    pictures = {"image": Image.new("RGB", (32, 32), (index * 40, 0, 90))} if image else {}
    return {"id": str(index), "conversations": [question, {"from": "gpt", "value": f"Number {index}."}], **pictures}


@pytest.fixture
def batch(tiny_processor: MoFProcessor) -> dict[str, Tensor]:
    return SupervisedCollator(tiny_processor)([record(1), record(2, image=False), record(3)])


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradient_reaches_adapters_and_language_model(tiny_model: MoFForConditionalGeneration, batch: dict[str, Tensor]) -> None:
    tiny_model.train()
    tiny_model(**batch).loss.backward()
    for name, parameter in tiny_model.named_parameters():
        if name.startswith("mixer.encoders."):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad.abs().sum() > 0, name
    assert not any(module.training for module in tiny_model.mixer.encoders["a"].modules())


def test_batch_without_images_touches_the_adapters(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    batch = SupervisedCollator(tiny_processor)([record(1, image=False)])
    calls: list[int] = []
    tiny_model.mixer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = tiny_model(**batch).loss
    assert not calls
    tiny_model.train()
    loss = tiny_model(**batch).loss
    loss.backward()
    assert torch.equal(loss, expected) and calls == [1]
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in tiny_model.mixer.adapters.parameters())


@pytest.mark.parametrize("frozen_llm", [False, True])
def test_gradient_checkpointing(frozen_llm: bool, tiny_model: MoFForConditionalGeneration, batch: dict[str, Tensor]) -> None:
    tiny_model.language_model.requires_grad_(not frozen_llm)
    tiny_model.train()
    tiny_model(**batch).loss.backward()
    plain = gradients(tiny_model)
    tiny_model.zero_grad()
    calls: list[int] = []
    tiny_model.language_model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    tiny_model.activation_checkpointing_enable()
    tiny_model(**batch).loss.backward()
    assert len(calls) == 2  # once forward, once again backward
    checkpointed = gradients(tiny_model)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])
    assert any(name.startswith("mixer.adapters.") for name in plain)
    assert any(name.startswith("language_model.") for name in plain) != frozen_llm


def test_lora(
    tiny_model: MoFForConditionalGeneration,
    tiny_tokenizer: PreTrainedTokenizerFast,
    batch: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    tiny_model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        target_modules=r"language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["adapters.a", "adapters.b"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(tiny_model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = set(gradients(model))
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert any("lora_B" in name for name in trained) and any("adapters.a.modules_to_save" in name for name in trained)

    model.eval().save_pretrained(tmp_path / "lora")
    base = MoFForConditionalGeneration.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**prompt).logits, model(**prompt).logits)
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(**prompt, max_new_tokens=4, do_sample=False), written)


def test_bfloat16(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(tiny_tokenizer, build_llm(tiny_tokenizer, torch.bfloat16)).train()
    batch = SupervisedCollator(MoFProcessor.from_parts(model, tiny_tokenizer))([record(1), record(2, image=False)])
    coarse = model(**batch).loss
    coarse.backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.mixer.adapters.parameters())
    torch.testing.assert_close(coarse.float(), model.float()(**batch).loss, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch).loss, coarse.float(), rtol=0.02, atol=0.02)


def test_resumed_training_goes_on_as_if_never_stopped(
    tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model.save_pretrained(tmp_path / "start")

    def losses(resume: str | None, steps: int) -> list[float]:
        model = MoFForConditionalGeneration.from_pretrained(tmp_path / "start")
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            max_steps=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        data = [record(index, image=index % 3 > 0) for index in range(8)]
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=SupervisedCollator(tiny_processor))
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-steps:]

    whole = losses(None, 4)
    resumed = losses(str(tmp_path / "run/checkpoint-2"), 2)
    assert resumed == pytest.approx(whole[2:], abs=1e-6)
    assert "missing keys" not in caplog.text


TWO = """
import sys
from accelerate import PartialState
from support import train_curve
PartialState(cpu=True)
train_curve.main(sys.argv[1], int(sys.argv[2]))
PartialState().destroy_process_group()  # or a thread of gloo may abort the process that ends
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    """Same global batch; one of the two ranks sees no image at all, and answers differ in length by a factor of five."""
    launch.run(TWO, tmp_path / "two.json", 2, count=2)
    train_curve.main(str(tmp_path / "one.json"), 4)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert len(one["losses"]) == 6 and one["losses"][-1] < one["losses"][0]
    for key in ("losses", "norms", "adapters"):
        assert two[key] == pytest.approx(one[key], abs=2e-5, rel=1e-5), key
