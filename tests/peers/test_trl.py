"""trl's trainers on records with images. They call the base model, and compute the loss from its hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mof import MoFForConditionalGeneration, MoFProcessor
from mof.data import SupervisedCollator, read_records

trl = pytest.importorskip("trl", exc_type=ImportError)
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

ROWS = 4
IMAGES = [Image.new("RGB", (40, 30), (60 * index, 90, 30)) for index in range(ROWS)]
ASK = [{"role": "user", "content": "What is it?"}]
CAT, DOG = ([{"role": "assistant", "content": text}] for text in ("A cat.", "A dog, I guess."))
SHARED = {"images": [[image] for image in IMAGES], "prompt": [ASK] * ROWS}
RECORDS: dict[str, dict[str, list[Any]]] = {
    "SFT": SHARED | {"completion": [CAT] * ROWS},
    "DPO": SHARED | {"chosen": [CAT] * ROWS, "rejected": [DOG] * ROWS},
    "KTO": SHARED | {"completion": [CAT, DOG] * (ROWS // 2), "label": [True, False] * (ROWS // 2)},
    "GRPO": SHARED,
    "RLOO": SHARED,
}


def count_letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.parametrize("kind", RECORDS)
def test_training(
    kind: str, from_path: bool, tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, tmp_path: Path
) -> None:
    folder = str(tmp_path / "model")
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"output_dir": str(tmp_path / "out"), "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    extra: dict[str, Any] = {}
    if kind in ("GRPO", "RLOO"):
        options |= {"num_generations": 2, "max_completion_length": 5, "beta": 0.1}
        extra["reward_funcs"] = count_letters
    else:
        options["max_length"] = None
    if not from_path:
        extra["processing_class"] = tiny_processor
    # The reference model of DPO, KTO, GRPO and RLOO is read from the folder that the model came from.
    trainer = getattr(trl, f"{kind}Trainer")(
        folder if from_path else MoFForConditionalGeneration.from_pretrained(folder),
        args=getattr(trl, f"{kind}Config")(**options),
        train_dataset=datasets.Dataset.from_dict(RECORDS[kind]),
        **extra,
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert isinstance(trainer.model, MoFForConditionalGeneration)
    if kind not in ("GRPO", "RLOO"):  # rewards of a random model may all be equal
        assert {name.split(".")[0] for name in changed} == {"mixer", "language_model"}
        assert not any("encoders" in name for name in changed)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)


def test_labels_of_selected_records(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, tmp_path: Path) -> None:
    """trl's SFTTrainer with our collator trains on the supervised tokens of a file that `mof vig select` wrote."""
    records = []
    for row, image in enumerate(IMAGES):
        image.save(tmp_path / f"{row}.png")
        talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
        mask = [place % 2 == row % 2 for place in range(8)]  # " A cat." has a token for each byte, and "</s>" has another
        records.append({"id": str(row), "image": f"{row}.png", "conversations": talk, "token_mask": mask})
    (tmp_path / "selected.json").write_text(json.dumps(records))
    options: dict[str, Any] = {"output_dir": str(tmp_path / "out"), "report_to": [], "use_cpu": True, "bf16": False, "max_length": None}
    trainer = trl.SFTTrainer(
        tiny_model,
        args=trl.SFTConfig(**options, per_device_train_batch_size=ROWS, max_steps=1, save_strategy="no", remove_unused_columns=False),
        train_dataset=datasets.Dataset.from_list(read_records(tmp_path / "selected.json")),
        data_collator=SupervisedCollator(tiny_processor, image_folder=tmp_path),
        processing_class=tiny_processor,
    )
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    kept = sorted(tiny_processor.tokenizer.decode(row[row != -100]) for row in labels)
    assert kept == ["  a.", "  a.", "Act</s>", "Act</s>"]  # of " A cat.</s>"
    assert trainer.train().training_loss > 0
