"""A training that diverges: it stops, names step and records, and leaves no weights that are not finite."""

from __future__ import annotations

import ast
import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from support import launch
from support.one_step import arguments
from support.tiny_llava import build_records
from torch.nn import functional as F

from mof.data.collator import SupervisedCollator
from vig import SelectiveTrainer
from vig.training import finetune
from vig.training.divergence import DivergenceError

IN_TURN = {"train_sampling_strategy": "sequential"}


def weighed(processor, record, image_folder, weight: float) -> dict:
    count = int((SupervisedCollator(processor, 2048, image_folder)([record])["labels"] != -100).sum())
    return record | {"token_weights": [weight] * count}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_names_its_step_and_records(llava, records, image_folder, tmp_path, accumulate) -> None:
    model, processor = copy.deepcopy(llava[0]), llava[1]
    chosen = [weighed(processor, record, image_folder, 3e38 if record["id"] == "r3" else 1.0) for record in records]
    args = arguments(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=accumulate, num_train_epochs=1, max_steps=-1, **IN_TURN
    )
    trainer = SelectiveTrainer(model, args, train_dataset=chosen, processing_class=processor, image_folder=image_folder)
    with pytest.raises(
        DivergenceError, match=rf"the loss of step {3 // accumulate + 1} is (inf|nan), with the records 'r3'; .*no checkpoint"
    ):
        trainer.train()


def test_a_gradient_that_is_not_finite_names_all_records_of_its_step(llava, records, image_folder, tmp_path) -> None:
    """It is seen at the step itself, although its loss is finite and the weights show it only later."""
    model, processor = copy.deepcopy(llava[0]), llava[1]
    args = arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=3, logging_steps=100, **IN_TURN)
    trainer = SelectiveTrainer(model, args, train_dataset=records, processing_class=processor, image_folder=image_folder)
    weight = model.get_output_embeddings().weight
    weight.register_hook(lambda gradient: gradient * (float("nan") if trainer.state.global_step == 1 else 1))
    with pytest.raises(DivergenceError, match="gradient of step 2 is nan, with the records 'r2', 'r3';"):
        trainer.train()


def test_no_checkpoint_and_no_model_of_weights_that_are_not_finite(llava, records, image_folder, tmp_path) -> None:
    """The first two steps are saved, the third makes the weights infinite with a finite loss and gradient."""
    model, processor = copy.deepcopy(llava[0]), llava[1]
    more = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    rates = iter([1e-3, 1e-3, float("inf")])
    args = arguments(tmp_path / "checkpoints", logging_steps=100, **more, **IN_TURN)
    trainer = SelectiveTrainer(model, args, train_dataset=records, processing_class=processor, image_folder=image_folder)
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.param_groups[0].update(lr=next(rates)))
    with pytest.raises(DivergenceError, match=r"after step 3, .*weights are not finite.*checkpoint-2"):
        trainer.train()
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoints/checkpoint-2/model.safetensors").values())


def test_finetune_saves_nothing_of_a_diverged_training(llava, records, image_folder, tmp_path) -> None:
    model, processor = copy.deepcopy(llava[0]), llava[1]
    options = {
        "trainer_options": {"image_folder": image_folder},
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "dataloader_num_workers": 0,
    }
    with pytest.raises(DivergenceError, match="step"):
        finetune(
            model, processor, records, tmp_path, learning_rate=1e38, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, **options
        )
    assert not (tmp_path / "model.safetensors").exists()


def test_an_evaluation_that_is_not_finite_names_its_records(llava, records, image_folder, tmp_path) -> None:
    model, processor = llava
    chosen = [weighed(processor, record, image_folder, 3e38 if record["id"] == "r2" else 1.0) for record in records[:4]]
    args = arguments(tmp_path, per_device_eval_batch_size=2)
    trainer = SelectiveTrainer(model, args, eval_dataset=chosen, processing_class=processor, image_folder=image_folder)
    with pytest.raises(DivergenceError, match="evaluation is not finite, with the records 'r2', 'r3'"):
        trainer.evaluate()


# --- the loss of an evaluation
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("padding_free", [False, True])
def test_evaluation_loss_is_the_mean_over_all_tokens_in_any_batches(
    llava, records, image_folder, text_only, tmp_path, size, padding_free
) -> None:
    model, processor = llava
    long = {"id": "long", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "two and two make four, as I said"}]}
    given = [*records[:3], text_only, long]
    given[1] = given[1] | {"token_mask": [False] * len(weighed(processor, given[1], image_folder, 1)["token_weights"])}
    batch = SupervisedCollator(processor, 2048, image_folder)(given)
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100).item()
    args = arguments(tmp_path, per_device_eval_batch_size=size)
    options = {"processing_class": processor, "image_folder": image_folder, "padding_free": padding_free}
    trainer = SelectiveTrainer(model, args, eval_dataset=given, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert trainer.predict(given).metrics["test_loss"] == pytest.approx(expected, abs=1e-5) or padding_free


TWO_PROCESSES = """
import json, sys, torch
from pathlib import Path
from support.one_step import arguments
from support.tiny_llava import build_llava
from vig import SelectiveTrainer
torch.set_num_threads(1)
out, images = Path(sys.argv[1]), Path(sys.argv[2])
records = json.loads((out / "records.json").read_text())
model, processor = build_llava()
losses = []
for size, count, padding_free in ((1, 3, False), (2, 5, False), (2, 5, True), (4, 5, False)):
    args = arguments(out, per_device_eval_batch_size=size)
    options = {"processing_class": processor, "image_folder": images, "padding_free": padding_free}
    trainer = SelectiveTrainer(model, args, eval_dataset=records[:count], **options)
    losses.append(trainer.evaluate()["eval_loss"])
(out / f"losses-{args.process_index}").write_text(repr(losses))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_evaluation_loss_on_two_processes(llava, tmp_path) -> None:
    """The last batches are filled up with records of the first, which count once."""
    model, processor = llava
    images = tmp_path / "images"
    records = build_records(images, 5)
    (tmp_path / "records.json").write_text(json.dumps(records))  # the processes write no images, so none is read half written
    expected = {}
    for count in (3, 5):
        trainer = SelectiveTrainer(model, arguments(tmp_path), processing_class=processor, image_folder=images)
        expected[count] = trainer.evaluate(records[:count])["eval_loss"]
    launch.run(TWO_PROCESSES, tmp_path, images, count=2)
    for rank in (0, 1):
        losses = ast.literal_eval((tmp_path / f"losses-{rank}").read_text())
        assert losses == pytest.approx([expected[3], expected[5], expected[5], expected[5]], abs=1e-5)
