"""`mof train` as a user calls it, on tiny models: against trainings written here, on two processes, killed, and with bad input."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import families, launch
from support.commands import mof, refused
from support.tiny import build_model
from support.tiny_llava import build_llava, build_records
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GPT2Config, MixtralConfig, Trainer, TrainingArguments

from encoders.runs import RunLock
from encoders.saved_folders import card_path
from mof import MoFProcessor
from mof.data.collator import SupervisedCollator
from mof.data.records import RecordError
from mof.data.rows import read_records
from vig import SelectiveTrainer, load_scores
from vig.training.checkpoints import last_checkpoint
from vig.training.finetuning import training_file

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = """
import sys
steps = int(sys.argv.pop(1))
import torch
torch.set_num_threads(1)
from support.launch import held_after
from mof.cli.app import build_app
from vig import SelectiveTrainer
from vig.cli.train import train
from vig.training.finetuning import training_file
SelectiveTrainer.training_step = held_after(steps, SelectiveTrainer.training_step)
build_app({"train": train, "vig": train})()
"""
STEPS = ("--learning-rate", "0.01", "--batch-size", "1")  # four of them
SMALL = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "num_local_experts": 4}
SGD = ("--set", "optim=sgd", "--set", "lr_scheduler_type=constant", "--learning-rate", "0.01", "--set", "max_grad_norm=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, images/ and records.json of eight records."""
    folder = tmp_path_factory.mktemp("train")
    model, processor = build_llava()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "records.json").write_text(json.dumps(build_records(folder / "images", 8)))
    return folder


def arguments(folder: Path, out: Path, *more: object, **changes: object) -> list[str]:
    given = {"model": folder / "model", "records": folder / "records.json", "images": folder / "images", "output": out, **changes}
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    return [str(word) for word in ("train", *options, "--set", "dataloader_num_workers=0", *more)]


def trained(folder: Path, out: Path, *more: object, **changes: object) -> dict[str, torch.Tensor]:
    """The weights that the command wrote, by the names that they have on disk."""
    result = mof(*arguments(folder, out, *more, **changes))
    assert result.exit_code == 0, result.output
    return load_file(out / "model.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def start(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def by_hand(folder: Path, out: Path, kind: type[Trainer], records: list, args: TrainingArguments) -> dict[str, torch.Tensor]:
    """A training without the command: everything but the vision tower."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder / "model"), build_llava()[1]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    collator = SupervisedCollator(processor, 2048, folder / "images")
    kind(model, args, train_dataset=records, processing_class=processor, data_collator=collator).train()
    model.save_pretrained(out)
    return load_file(out / "model.safetensors")


def select(folder: Path, tmp_path: Path, *more: str) -> Path:
    inputs = ("--records", folder / "records.json")
    if not (folder / "scores").exists():
        score = ("vig", "score", "--model", folder / "model", "--images", folder / "images", "--output", folder / "scores")
        result = mof(*score, *inputs)
        assert result.exit_code == 0, (result.output, result.exception)
    result = mof("vig", "select", "--scores", folder / "scores", *inputs, *more, "--output", tmp_path / "selected.json")
    assert result.exit_code == 0, result.output
    return tmp_path / "selected.json"


def test_from_scores_to_a_model_that_chats_and_is_scored(folder, tmp_path) -> None:
    selected = select(folder, tmp_path, "--keep", "0.5")
    result = mof(*arguments(folder, tmp_path / "tuned", "--learning-rate", "0.01", records=selected, epochs=3, batch_size=2))
    assert result.exit_code == 0, result.output
    assert "it/s" in result.stderr or "s/it" in result.stderr  # a bar with rate and time left
    supervised = 3 * sum(sum(record["token_mask"]) for record in json.loads(selected.read_text()))
    assert f"{supervised} supervised tokens" in result.stdout and str(tmp_path / "tuned") in result.stdout
    facts = json.loads((tmp_path / "tuned" / "training.json").read_text())["result"]
    assert facts["active_tokens"] == supervised and facts["losses"][-1] < facts["losses"][0]
    before, after = start(folder), load_file(tmp_path / "tuned" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) == ("vision_tower" in name) for name in before if "lm_head" not in name)
    chat = ("chat", "--model", tmp_path / "tuned", "--image", folder / "images/0.png", "--max-new-tokens", "3", "What is it?")
    assert mof(*chat).exit_code == 0
    score = ("vig", "score", "--model", tmp_path / "tuned", "--records", selected, "--images", folder / "images")
    assert mof(*score, "--output", tmp_path / "scores").exit_code == 0
    assert len(load_scores(tmp_path / "scores")) == 4


def training_arguments(tmp_path: Path, **more: object) -> TrainingArguments:
    common = {"per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "no", "remove_unused_columns": False}
    return TrainingArguments(str(tmp_path / "run"), **common, **more)


def test_equals_the_trainer_called_from_python(folder, tmp_path) -> None:
    selected = select(folder, tmp_path, "--keep", "0.7")
    more = ("--batch-size", 2, "--accumulate", 3, "--epochs", 2, "--learning-rate", 0.001, "--set", "weight_decay=0.1", "--set", "seed=3")
    got = trained(folder, tmp_path / "command", *more, records=selected)
    args = training_arguments(
        tmp_path, gradient_accumulation_steps=3, num_train_epochs=2, learning_rate=0.001, weight_decay=0.1, seed=3, optim="adamw_torch",
        lr_scheduler_type="cosine", warmup_steps=0.03,
    )  # fmt: skip
    expected = by_hand(folder, tmp_path / "python", SelectiveTrainer, json.loads(selected.read_text()), args)
    assert distance(got, start(folder)) > 1e-4
    assert distance(got, expected) == 0


def test_everything_kept_is_ordinary_training(folder, tmp_path) -> None:
    selected = select(folder, tmp_path, "--keep", "1", "--token-threshold", "none")
    got = trained(folder, tmp_path / "command", *SGD, "--batch-size", 2, records=selected)
    args = training_arguments(
        tmp_path, gradient_accumulation_steps=2, num_train_epochs=1, learning_rate=0.01, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0,
    )  # fmt: skip
    expected = by_hand(folder, tmp_path / "python", Trainer, json.loads((folder / "records.json").read_text()), args)
    assert distance(got, start(folder)) > 1e-4
    assert distance(got, expected) < 1e-6


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_as_one_does(folder, tmp_path) -> None:
    """Also where one of them has no image in a step, on which the projector of the other waited."""
    asked = {"from": "human", "value": "What?"}
    texts = [{"id": f"t{n}", "conversations": [asked, {"from": "gpt", "value": "dog " * n}]} for n in (1, 2, 3)]
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps(json.loads((folder / "records.json").read_text())[:5] + texts))
    one = trained(folder, tmp_path / "one", *SGD, "--batch-size", 2, records=mixed)
    words = arguments(folder, tmp_path / "two", *SGD, "--batch-size", 1, "--gradient-checkpointing", records=mixed)
    told = launch.run(SCRIPT, 0, *words, count=2)
    assert "".join(told).count("the trained model is in") == 1
    assert distance(load_file(tmp_path / "two" / "model.safetensors"), one) < 1e-6
    refused(mof(*arguments(folder, tmp_path / "two", *SGD, "--batch-size", 1)), "processes: 2 there, 1 now")


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_in_half_precision_and_from_the_last_step(folder, tmp_path, step) -> None:
    """What trains is float32, and stays so through a checkpoint; a run killed while it saves the model has no step left."""
    model, processor = build_llava()
    model.bfloat16().save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    more = ("--batch-size", 1, "--accumulate", 1, "--epochs", 0.5, "--set", "save_steps=2", "--set", "save_total_limit=5")
    more += ("--set", "lr_scheduler_type=constant", "--learning-rate", 1e-3)
    whole = trained(folder, tmp_path / "out", *more, model=tmp_path / "half")
    before = json.loads((tmp_path / "out/training.json").read_text())
    assert before["result"]["steps"] == 4
    training_file(tmp_path / "out").write(before["identity"])
    (tmp_path / "out/model.safetensors").unlink()
    if step == 2:
        shutil.rmtree(tmp_path / "out/checkpoints/checkpoint-4")
    assert distance(trained(folder, tmp_path / "out", *more, model=tmp_path / "half"), whole) == 0
    after = json.loads((tmp_path / "out/training.json").read_text())["result"]
    assert (after["steps"], after["active_tokens"]) == (4, before["result"]["active_tokens"])


def test_a_second_run_at_once_is_refused(folder, tmp_path) -> None:
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    lock = RunLock(tmp_path / "out/checkpoints", 0)
    lock.take()
    refused(mof(*arguments(folder, tmp_path / "out", *STEPS)), "still alive")
    lock.release()
    trained(folder, tmp_path / "out", *STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--lora", 2)], ids=["whole", "lora"])
def test_killed_and_resumed_is_the_undisturbed_run(folder, tmp_path, lora) -> None:
    more = ("--epochs", 4, "--batch-size", 1, "--learning-rate", 0.01, *lora)
    whole = trained(folder, tmp_path / "whole", *more)
    out = tmp_path / "killed"
    checkpoints = out / "checkpoints"
    (process,) = processes = launch.start(SCRIPT, 12, *arguments(folder, out, *more))  # six of 16 steps
    while not (checkpoints.is_dir() and list(checkpoints.glob("checkpoint-*/trainer_state.json"))):
        assert process.exitcode is None, launch.kill(processes)
        time.sleep(0.02)
    launch.kill(processes)
    assert not (out / "model.safetensors").exists()
    (checkpoints / "checkpoint-9999").mkdir()  # as a kill in the middle of writing leaves it
    shutil.copy(next(checkpoints.glob("checkpoint-*/trainer_state.json")), checkpoints / "checkpoint-9999")
    resumed = mof(*arguments(folder, out, *more))
    assert 0 < resumed.stdout.count("'loss'") < 16, resumed.output  # steps of the whole run
    assert distance(load_file(out / "model.safetensors"), whole) == 0
    tokens = [json.loads((tmp_path / name / "training.json").read_text())["result"]["active_tokens"] for name in ("whole", "killed")]
    assert tokens[0] == tokens[1]
    written = (out / "model.safetensors").stat().st_mtime_ns
    again = mof(*arguments(folder, out, *more))
    assert again.exit_code == 0 and "done already" in again.stdout
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_lora_changes_the_language_models_matrices_by_the_rank_and_nothing_else(folder, tmp_path) -> None:
    pytest.importorskip("peft")
    before, after = start(folder), trained(folder, tmp_path / "tuned", "--lora", 2, *STEPS, "--gradient-checkpointing")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert changed == {name for name in before if "language_model" in name and name.split(".")[-2] in linear}
    for name in changed:
        values = torch.linalg.svdvals(after[name] - before[name])
        assert values[2] < 1e-5 < values[0]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2), ("c_attn", "c_proj", "c_fc")),
        (MixtralConfig(**SMALL), ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")),
    ],
    ids=["conv1d", "experts"],
)
def test_lora_of_other_language_models(tiny_tokenizer, folder, tmp_path, config, names) -> None:
    """GPT-2 has layers of its own class, Conv1D; a mixture has its experts in a single parameter, and saves them one by one."""
    pytest.importorskip("peft")
    model = build_model(tiny_tokenizer, AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path / "model")
    MoFProcessor.from_parts(model, tiny_tokenizer).save_pretrained(tmp_path / "model")
    before = load_file(tmp_path / "model/model.safetensors")
    after = trained(folder, tmp_path / "tuned", "--lora", 2, *STEPS, model=tmp_path / "model")
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == set(names)
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    ("family", "encoder", "lora"),
    [
        ("qwen2_5_vl", "visual.", False),
        ("qwen2_5_vl", "visual.", True),
        ("smolvlm", "model.vision_model.", True),
        ("internvl", "vision_tower.", False),
    ],
)
def test_other_families(folder, tmp_path, family, encoder, lora) -> None:
    """The image encoder stays, the layers of the language model move; with LoRA nothing else does."""
    model, processor = families.build(family)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    before = load_file(tmp_path / "model/model.safetensors")
    after = trained(folder, tmp_path / "tuned", *STEPS, *(["--lora", 2] if lora else []), model=tmp_path / "model")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("layers.0.mlp" in name for name in moved) and not any(name.startswith(encoder) for name in moved)
    assert all(".layers." in name for name in moved) == lora


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_trained_in_bfloat16(folder, tmp_path, dtype) -> None:
    model, processor = build_llava()
    model.to(dtype).save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    before = load_file(tmp_path / "half/model.safetensors")
    after = trained(folder, tmp_path / "tuned", *STEPS, model=tmp_path / "half")
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    whole = trained(folder, tmp_path / "whole", *STEPS)
    step, full = (
        torch.cat([(b[name].float() - a[name].float()).flatten() for name in b]) for a, b in ((before, after), (start(folder), whole))
    )
    assert torch.cosine_similarity(step, full, dim=0) > 0.9


def test_a_model_of_this_library_on_stored_features(folder, tiny_folder, tmp_path) -> None:
    """Encoders run, or features out of a store: the same training, up to the float16 of the store."""
    encode = ("encode", "--model", tmp_path / "model", "--images", folder / "images", "--tokens", "float16", "--device", "cpu")
    assert mof(*encode, "--output", tmp_path / "features").exit_code == 0
    read = trained(folder, tmp_path / "read", *SGD, model=tmp_path / "model")
    stored = trained(folder, tmp_path / "stored", *SGD, "--features", tmp_path / "features", model=tmp_path / "model")
    assert not any("encoders" in name for name in read)
    step = distance(read, load_file(tmp_path / "model/model.safetensors"))
    assert 0 < distance(read, stored) < 0.02 * step
    refused(mof(*arguments(folder, tmp_path / "x", "--features", tmp_path / "features")), "not a llava model")


def changed(folder: Path, tmp_path: Path, change) -> Path:
    """A file with the records, the third of them changed."""
    records = json.loads((folder / "records.json").read_text())
    change(records[2])
    (tmp_path / "changed.json").write_text(json.dumps(records))
    return tmp_path / "changed.json"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(conversations=record["conversations"][:1]), ["1 of 8 records", "'r2'", "no answer"]),
        (lambda record: record.update(image="gone.png"), ["1 of 8 records", "'r2'", "gone.png"]),
        (lambda record: record.update(conversations=[]), ["1 of 8 records", "'r2'"]),
        (lambda record: record["conversations"][0].update(value="no placeholder"), ["'r2'", "placeholder"]),
    ],
)
def test_records_that_cannot_be_trained_on_are_named_at_once(folder, tmp_path, change, words) -> None:
    refused(mof(*arguments(folder, tmp_path / "out", records=changed(folder, tmp_path, change))), *words)
    assert not (tmp_path / "out").exists()


def test_a_selection_that_does_not_fit_is_refused_at_once(folder, tmp_path) -> None:
    selected = select(folder, tmp_path)
    refused(mof(*arguments(folder, tmp_path / "out", "--max-length", 14, records=selected)), "answer tokens", "--max-length")
    records = json.loads(selected.read_text())
    for record in records:
        record["token_mask"].append(True)
    selected.write_text(json.dumps(records))
    card = card_path(selected)
    refused(mof(*arguments(folder, tmp_path / "out", records=selected)), "selected.json", f"delete {card.name}")
    card.unlink()
    refused(mof(*arguments(folder, tmp_path / "out", records=selected)), "token_mask", "another tokenizer")
    text = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    selected.write_text(json.dumps([*records, text]))  # the shortest record fits
    refused(mof(*arguments(folder, tmp_path / "out", records=selected)), "token_mask", "another tokenizer", "selected.json")
    assert not (tmp_path / "out").exists()


def test_wrong_folders_and_files(folder, tmp_path) -> None:
    out = tmp_path / "out"
    refused(mof(*arguments(folder, out, model=tmp_path / "nothing")), "nothing", "config.json")
    refused(mof(*arguments(folder, out, records=tmp_path / "no.json")), "no.json")
    refused(mof(*arguments(folder, out, images=tmp_path / "nowhere")), "nowhere", "--images")
    refused(mof(*arguments(folder, out, images=tmp_path)), "8 of 8 records", str(tmp_path))
    (tmp_path / "empty.json").write_text("[]")
    refused(mof(*arguments(folder, out, records=tmp_path / "empty.json")), "no records")
    assert not out.exists()
    refused(mof(*arguments(folder, folder / "model")), "no training", "new --output")


def test_the_folder_of_another_run_is_refused(folder, tmp_path) -> None:
    trained(folder, tmp_path / "out")
    refused(mof(*arguments(folder, tmp_path / "out", "--learning-rate", 1e-3)), "another training", "learning_rate: 2e-05 there, 0.001 now")
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(json.loads((folder / "records.json").read_text())[:4]))
    refused(mof(*arguments(folder, tmp_path / "out", records=fewer)), "another training", "records")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "weight_decay"], ["NAME=VALUE"]),
        (["--set", "wieght_decay=0.1"], ["weight_decay"]),
        (["--set", "learning_rate=0.1"], ["--learning-rate"]),
        (["--set", "weight_decay=much"], ["weight_decay", "much"]),
        (["--set", "label_smoothing_factor=0.1"], ["label smoothing"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--learning-rate", "nan"], ["--learning-rate"]),
    ],
)
def test_arguments_that_will_not_do(folder, tmp_path, words, told) -> None:
    refused(mof(*arguments(folder, tmp_path / "out", *words)), *told)


def test_a_run_that_was_refused_does_not_hold_the_folder(folder, tmp_path) -> None:
    refused(mof(*arguments(folder, tmp_path / "out", "--set", "lr_scheduler_type=cosin")), "cosin")
    refused(mof(*arguments(folder, tmp_path / "out", "--set", "label_smoothing_factor=0.1")), "label smoothing")
    trained(folder, tmp_path / "out")


def test_lists_of_messages_are_records(folder, tmp_path) -> None:
    image = {"type": "image", "image": "0.png"}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "A dog."}]
    (tmp_path / "records.jsonl").write_text(json.dumps(messages) + "\n")
    assert "1 steps" in mof(*arguments(folder, tmp_path / "out", records=tmp_path / "records.jsonl")).stdout


# --- a training that diverges, damaged checkpoints
def test_a_diverged_training_saves_no_model(folder, tmp_path) -> None:
    more = ("--batch-size", 1, "--accumulate", 1, "--set", "save_steps=1", "--set", "warmup_steps=0", "--set", "max_grad_norm=0")
    result = mof(*arguments(folder, tmp_path / "out", "--learning-rate", 1e30, *more, "--set", "optim=sgd"))
    refused(result, "diverged", "step 2", "'r", "last good checkpoint", "checkpoint-1")
    assert not (tmp_path / "out/model.safetensors").exists()
    assert [path.name for path in (tmp_path / "out/checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "out/checkpoints/checkpoint-1/model.safetensors").values())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "torn trainer_state.json": lambda path: (path / "trainer_state.json").write_bytes((path / "trainer_state.json").read_bytes()[:100]),
    "flipped optimizer.pt": lambda path: flip(path / "optimizer.pt"),
    "flipped model.safetensors": lambda path: flip(path / "model.safetensors"),
    "empty scheduler.pt": lambda path: (path / "scheduler.pt").write_bytes(b""),
    "no rng_state.pth": lambda path: (path / "rng_state.pth").unlink(),
}


@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_checkpoint_is_left_for_the_one_before(folder, tmp_path, caplog, sealed) -> None:
    """Without digests, as in checkpoints of earlier releases, a flipped bit of the weights cannot be seen."""
    more = ("--batch-size", 1, "--accumulate", 4, "--epochs", 2, "--set", "save_steps=1", "--learning-rate", 0.01)
    whole = trained(folder, tmp_path / "out", *more)
    checkpoints = tmp_path / "out/checkpoints"
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    shutil.copytree(checkpoints, tmp_path / "sound")
    for what, damage in DAMAGE.items():
        if sealed or "model" not in what:
            shutil.rmtree(checkpoints)
            shutil.copytree(tmp_path / "sound", checkpoints)
            if not sealed:
                (checkpoints / "checkpoint-4/digests.json").unlink()
            damage(checkpoints / "checkpoint-4")
            caplog.clear()
            assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-3")
            fault = "random states" if not sealed and "rng" in what else what.split()[1][:9]
            assert "checkpoint-4" in caplog.text and fault in caplog.text, (what, caplog.text)
    file = training_file(tmp_path / "out")
    file.write(file.read()["identity"])
    assert distance(trained(folder, tmp_path / "out", *more), whole) == 0


def test_without_a_whole_checkpoint_it_says_that_it_starts_over(folder, tmp_path, caplog) -> None:
    whole = trained(folder, tmp_path / "out", *STEPS)
    for path in (tmp_path / "out/checkpoints").glob("checkpoint-*"):
        flip(path / "optimizer.pt")
    file = training_file(tmp_path / "out")
    file.write(file.read()["identity"])
    assert distance(trained(folder, tmp_path / "out", *STEPS), whole) == 0
    assert "none of the 2 checkpoints is whole" in caplog.text


def test_a_full_disk_is_named(folder, tmp_path, monkeypatch) -> None:
    def full(self, *args):
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 704 vs 598")

    monkeypatch.setattr(SelectiveTrainer, "_save_optimizer_and_scheduler", full)
    refused(mof(*arguments(folder, tmp_path / "out", *STEPS)), "checkpoint-1", "cannot be written")


# --- records to evaluate on, records that were changed
def test_evaluation_records(folder, tmp_path) -> None:
    records = json.loads((folder / "records.json").read_text())
    for name, part in (("train", records[:5]), ("held", records[5:]), ("mixed", [*records[5:], {**records[0], "token_mask": None}])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    more = ("--learning-rate", 0.01, "--batch-size", 1, "--accumulate", 1, "--set", "save_steps=2")
    result = mof(*arguments(folder, tmp_path / "out", *more, "--eval-records", tmp_path / "held.json", records=tmp_path / "train.json"))
    assert result.exit_code == 0, result.output
    assert "evaluation loss" in result.stdout
    losses = json.loads((tmp_path / "out/training.json").read_text())["result"]["eval_losses"]
    assert len(losses) == 3  # after steps 2, 4 and 5
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), build_llava()[1]
    args = TrainingArguments(str(tmp_path / "x"), use_cpu=True, report_to=[], per_device_eval_batch_size=3)
    trainer = SelectiveTrainer(model, args, processing_class=processor, image_folder=folder / "images")
    assert losses[-1] == pytest.approx(trainer.evaluate(records[5:])["eval_loss"], rel=1e-5)
    mixed = arguments(folder, tmp_path / "x", "--eval-records", tmp_path / "mixed.json", records=tmp_path / "train.json")
    refused(mof(*mixed), "1 of the 4 records", "'r0'")
    refused(mof(*arguments(folder, tmp_path / "x", "--set", "eval_strategy=epoch")), "eval_strategy", "--eval-records")
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").glob("*.json"))


def test_records_that_changed_after_the_selection_are_refused(folder, tmp_path) -> None:
    selected = select(folder, tmp_path, "--keep", "1")
    records = json.loads(selected.read_text())
    records[1]["conversations"][1]["value"] = records[1]["conversations"][1]["value"].swapcase()
    selected.write_text(json.dumps(records))
    card_path(selected).unlink()  # it would refuse any edit
    refused(mof(*arguments(folder, tmp_path / "out", records=selected)), "'r1'", "has changed")
    processor = build_llava()[1]
    with pytest.raises(RecordError, match="'r1' has changed"):
        SelectiveTrainer(
            build_llava()[0], TrainingArguments(str(tmp_path / "x"), use_cpu=True), processing_class=processor, train_dataset=records
        )


def test_select_refuses_records_that_were_not_scored(folder, tmp_path) -> None:
    selected = select(folder, tmp_path)
    before = selected.read_bytes()
    inputs = ("vig", "select", "--scores", folder / "scores", "--output", selected, "--records")
    refused(mof(*inputs, changed(folder, tmp_path, lambda record: record["conversations"][1].update(value="Something else."))), "'r2'")
    (tmp_path / "other.json").write_text(json.dumps([{"id": "x", "image": "0.png", "conversations": []}]))
    refused(mof(*inputs, tmp_path / "other.json"), "met none of these records")
    assert selected.read_bytes() == before
    lines = ("vig", "select", "--scores", folder / "scores", "--records", folder / "records.json", "--output", tmp_path / "selected.jsonl")
    assert mof(*lines).exit_code == 0
    assert read_records(tmp_path / "selected.jsonl") == json.loads(before)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("report_to=wandb", ["report_to=wandb", "not installed"]),
        ("optim=galore_adamw", ["not installed", "galore"]),
        ("optim=grokadamw", ["refused", "pip install grokadamw"]),
        ("lr_scheduler_type=cosine_with_min_lr", ["refused", "min_lr"]),
        ("adam_beta1=2", ["refused", "beta"]),
        ("use_liger_kernel=true", ["not installed", "liger"]),
        ("group_by_length=true", ["train_sampling_strategy=group_by_length"]),
    ],
)
def test_what_is_not_installed_or_has_another_name_is_one_line(folder, tmp_path, option, told) -> None:
    refused(mof(*arguments(folder, tmp_path / "out", "--set", option)), *told)


def test_batches_of_like_length(folder, tmp_path) -> None:
    whole = trained(folder, tmp_path / "out", *STEPS, "--set", "train_sampling_strategy=group_by_length")
    assert distance(whole, start(folder)) > 1e-4
