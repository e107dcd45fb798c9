"""Memory that runs out, copies through pinned memory, and no wait for the device where work is queued."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.devices import Waits, waits
from support.one_step import arguments
from torch import Tensor

from encoders import build_encoder, encode_images
from encoders.store.items import ItemEncoder
from mof import InterleavedMoF
from mof.data.answer_tokens import encode_record
from mof.data.collator import SupervisedCollator
from mof.data.records import to_record
from vig import SelectiveTrainer, score
from vig.scoring.answer_losses import AnswerLosses
from vig.training.finetuning import ON_GPU

MEGABYTES_PER_TOKEN = 4


def test_out_of_memory_halves_the_batches(
    device: str, llava: Any, records: list[dict[str, Any]], tmp_path: Path, monkeypatch, caplog
) -> None:
    """On a GPU the allocator itself refuses: each pass asks for as much more as it has tokens, and the process may have little."""
    model, processor = llava
    model = model.to(device)
    expected = score(model, processor, records, image_folder=tmp_path / "images")
    forward = model.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs["input_ids"].numel()
        if device == "cpu" and tokens > 130:
            raise torch.OutOfMemoryError("out of memory")
        if device == "cuda":
            del_later = torch.empty(tokens * MEGABYTES_PER_TOKEN * 2**20, dtype=torch.uint8, device=device)
            del del_later
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", limited)
    if device == "cuda":
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + 130 * MEGABYTES_PER_TOKEN * 2**20
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        with caplog.at_level(logging.WARNING, "vig"):
            found = score(model, processor, records, image_folder=tmp_path / "images", batch_tokens=2000)
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert "going on with half as many" in caplog.text and not found.failures
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.token_vig, other.token_vig, atol=1e-4)


def test_features_travel_through_pinned_memory(device: str, records: list[dict[str, Any]], tmp_path: Path, monkeypatch) -> None:
    original, seen = ItemEncoder._features, []

    def watched(self: ItemEncoder, name: str, images: list[Tensor]) -> Any:
        features, arrived = original(self, name, images)
        seen.append(({value.device.type for value in features.values()}, all(value.is_pinned() for value in features.values()), arrived))
        return features, arrived

    monkeypatch.setattr(ItemEncoder, "_features", watched)
    encode_images(
        tmp_path / "images",
        {"a": build_encoder("mini-clip")},
        tmp_path / "store",
        device=device,
        batch_size=3,
        tokens="float16",
        progress=False,
    )
    assert len(seen) == 4
    for devices, pinned, arrived in seen:
        assert devices == {"cpu"} and pinned == (arrived is not None) == (device == "cuda")


def test_encoding_waits_for_no_batch(device: str, tmp_path: Path, records: list[dict[str, Any]], monkeypatch) -> None:
    encoder, counts, original = build_encoder("mini-clip").to(device), [], ItemEncoder._features

    def counted(self: ItemEncoder, name: str, images: list[Tensor]) -> Any:
        counts.append(waits(device, lambda: original(self, name, images)))
        return original(self, name, images)

    monkeypatch.setattr(ItemEncoder, "_features", counted)
    monkeypatch.setattr("encoders.store.writer.LANES", 1)  # CUDA tells the waits of all threads together
    encode_images(tmp_path / "images", {"a": encoder}, tmp_path / "store", batch_size=3, tokens="int8", progress=False)
    assert counts and not any(counts)


@torch.no_grad()
def test_mixers_wait_for_nothing(device: str) -> None:
    mixer = InterleavedMoF({"clip": build_encoder("mini-clip"), "dino": build_encoder("mini-dino")}, 32).to(device)
    pixels = torch.randint(0, 256, (2, 3, 50, 50), dtype=torch.uint8, device=device)
    mixer(pixels)
    assert waits(device, lambda: mixer(pixels)) == 0


def test_scoring_waits_as_often_as_the_model_does(device: str, llava: Any, records: list[dict[str, Any]], tmp_path: Path) -> None:
    """The passes add no wait to those of the model's own forward pass (transformers' LLaVA counts its image tokens)."""
    model, processor = llava
    model = model.to(device)
    examples = [encode_record(processor, to_record(record, tmp_path / "images"), max_length=256) for record in records[:4]]
    losses = AnswerLosses(model, 0)
    losses([examples], 0)  # compares the first batch with a plain pass
    batch = losses._inputs(losses._collate(examples))
    with torch.no_grad():
        plain = waits(device, lambda: model(**batch, use_cache=False))
    positions = 1  # the places of the answers, found before the batch is on the device
    assert waits(device, lambda: losses([examples], 0)) <= plain + positions


def test_a_training_step_waits_as_often_as_the_model_does(device: str, llava: Any, records: list[dict[str, Any]], tmp_path: Path) -> None:
    model, processor = llava
    args = arguments(tmp_path / "trainer", use_cpu=device == "cpu", per_device_train_batch_size=4)
    trainer = SelectiveTrainer(model.to(device), args, train_dataset=records, processing_class=processor, image_folder=tmp_path / "images")
    batch = {name: value.to(device) for name, value in SupervisedCollator(processor, 256, tmp_path / "images")(records[:4]).items()}
    count = (batch["labels"] != -100).sum()
    trainer.training_step(model, dict(batch), count)  # looks at the model
    plain_batch = {name: value for name, value in batch.items() if name != "labels"}
    plain = waits(device, lambda: model(**plain_batch, use_cache=False).logits.mean().backward())
    positions, checks = 1, 1  # the places of the supervised tokens; the loss of the step before, which is there by then
    assert waits(device, lambda: trainer.training_step(model, dict(batch), count)) <= plain + positions + checks


def test_training_as_on_a_gpu(device: str, llava: Any, records: list[dict[str, Any]], tmp_path: Path) -> None:
    """Fused AdamW, and batches out of pinned memory that a worker process made."""
    model, processor = copy.deepcopy(llava[0]), llava[1]
    options = {**ON_GPU, "dataloader_pin_memory": device == "cuda", "dataloader_num_workers": 1}
    args = arguments(tmp_path / "trainer", use_cpu=device == "cpu", learning_rate=1e-3, max_steps=3, **options)
    trainer = SelectiveTrainer(model, args, train_dataset=records, processing_class=processor, image_folder=tmp_path / "images")
    before = {name: weight.clone() for name, weight in model.cpu().state_dict().items()}
    for batch in trainer.get_train_dataloader():
        assert {value.device.type for value in batch.values() if isinstance(value, Tensor)} == {device}
    model.to(device)
    trainer.train()
    assert trainer.optimizer.optimizer.defaults["fused"] is True
    assert any(not torch.equal(weight.cpu(), before[name]) for name, weight in model.state_dict().items())


def test_the_count_of_waits_sees_a_wait(device: str) -> None:
    numbers = torch.arange(5, device=device)
    assert waits(device, lambda: int(numbers.sum())) >= 1 and waits(device, lambda: numbers.nonzero()) >= 1
    assert waits(device, lambda: numbers + 1) == 0
    with Waits() as counted:
        numbers[:2].cpu()
    assert len(counted.seen) == (device == "cuda")
