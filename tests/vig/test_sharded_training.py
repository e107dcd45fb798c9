"""SelectiveTrainer under the repository's launch configs, on two real processes: equal to an explicit training on one."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import launch, sharded_training
from support.one_step import explicit_gradient
from support.tiny_llava import build_records
from torch import nn

LAUNCH = launch.ROOT / "recipes" / "configs" / "launch"
SCRIPT = launch.ROOT / "tests" / "support" / "sharded_training.py"
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "records.json").write_text(json.dumps(build_records(folder, 12)))
    return folder


def launched(images: Path, out: Path, config: str, cases: list[str], *options: str) -> None:
    """As the head of the config says it, for two processes."""
    flags = ["--config_file", str(LAUNCH / config), "--num_processes", "2", "--main_process_port", "0", *options]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(SCRIPT), str(images), str(out), *cases]
    environment = launch.environment(DS_ACCELERATOR="cpu")
    result = subprocess.run(command, cwd=launch.ROOT, capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stderr


@cache
def explicit_training(case: str, images: Path) -> tuple[list[float], nn.Module, float]:
    """One process, one record at a time, torch's own Adam: the loss of every step, the model, its loss on the first records."""
    model, processor = sharded_training.build(case)
    records, size, adam = sharded_training.build_records(processor, images), sharded_training.RECORDS_PER_STEP, sharded_training.ADAM
    model = model.float()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=adam["learning_rate"], eps=adam["adam_epsilon"])
    losses = []
    for first in range(0, len(records), size):
        loss, gradients = explicit_gradient(model, processor, records[first : first + size], images)
        losses.append(loss)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        torch.nn.utils.clip_grad_norm_(trainable, adam["max_grad_norm"])
        optimizer.step()
    return losses, model, explicit_gradient(model, processor, records[:size], images)[0]


def supervised_tokens(case: str, images: Path) -> int:
    _, processor = sharded_training.build(case)
    records = sharded_training.build_records(processor, images)
    return sum(value > 0 for record in records for value in record.get("token_mask", record.get("token_weights")))


def saved_model(case: str, folder: Path) -> nn.Module:
    model, _ = sharded_training.build(case)
    if case != "lora":
        return type(model).from_pretrained(folder, dtype=torch.float32)
    import peft

    return peft.PeftModel.from_pretrained(model.unload(), folder)


def assert_same_training(case: str, folder: Path, images: Path, rel: float) -> None:
    losses, expected, evaluated = explicit_training(case, images)
    found = json.loads((folder / "found.json").read_text())
    assert found["losses"] == pytest.approx(losses, rel=rel)
    assert found["evaluated"] == pytest.approx(evaluated, rel=rel)
    assert found["tokens"] == supervised_tokens(case, images)
    saved, start = saved_model(case, folder).state_dict(), sharded_training.build(case)[0].state_dict()
    for name, weight in expected.state_dict().items():
        assert (saved[name] - weight).norm() <= rel * weight.norm(), name
    assert any((saved[name] - weight).norm() > 0.01 * weight.norm() for name, weight in start.items())


def assert_same_trainings(cases: list[str], out: Path, images: Path, sharding: str) -> None:
    for case in cases:
        for folder in [out / case, *out.glob(f"{case}-resumed")]:
            assert json.loads((folder / "found.json").read_text())["sharding"] == sharding
            assert_same_training(case, folder, images, rel=0.03 if case == "bf16" else 1e-5)
    assert {path.name for path in out.glob("*-resumed")} == {f"{case}-resumed" for case in sharded_training.RESUMED}


def test_fsdp2(images, tmp_path) -> None:
    pytest.importorskip("peft")
    cases = ["llava", "tied", "lora", "mof", "bf16"]
    launched(images, tmp_path, "fsdp2.yaml", cases)
    assert_same_trainings(cases, tmp_path, images, "DTensor")


def test_fine_tuning_saves_whole_weights_in_their_own_types(images, tmp_path) -> None:
    """Also where checkpoints stay in shards. What trains does so in float32."""
    config = (LAUNCH / "fsdp2.yaml").read_text()
    assert "FULL_STATE_DICT" in config
    (tmp_path / "sharded.yaml").write_text(config.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT"))
    launched(images, tmp_path, str(tmp_path / "sharded.yaml"), ["half"])
    written = load_file(tmp_path / "half" / "model.safetensors")
    start = sharded_training.build("llava")[0].bfloat16()
    assert {weight.dtype for weight in written.values()} == {torch.bfloat16} and len(written) == len(start.state_dict())
    saved = type(start).from_pretrained(tmp_path / "half", dtype="auto").state_dict()
    for name, weight in start.state_dict().items():
        assert torch.equal(saved[name], weight) == ("vision_tower" in name), name


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="deepspeed compiles its communication on a CPU")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(images, tmp_path, stage) -> None:
    """The repository's file as it is, which is of stage 3, and the same with stage 2."""
    pytest.importorskip("peft")
    settings = json.loads((LAUNCH / "deepspeed_zero3.json").read_text())
    if stage == 2:
        settings["zero_optimization"] = {"stage": 2}
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    cases = ["llava", "tied", "lora", "mof"]
    launched(images, tmp_path, "deepspeed_zero3.yaml", cases, "--deepspeed_config_file", str(tmp_path / "deepspeed.json"))
    assert_same_trainings(cases, tmp_path, images, f"ZeRO-{stage}")
