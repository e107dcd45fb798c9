"""The selective loss against the ordinary Trainer, and its gradient against the explicit sum over the chosen tokens."""

import copy

import pytest
import torch
from support import launch
from support.one_step import arguments, assert_step_was, explicit_gradient, masked_records
from transformers import Trainer, TrainerCallback

from encoders import ImageError
from mof.data.collator import SupervisedCollator
from vig import SelectiveTrainer, score, select


@pytest.mark.parametrize(
    ("size", "accumulate", "accepts_loss_kwargs", "weights"),
    [(1, 4, True, False), (1, 4, False, True), (2, 2, True, True), (2, 2, False, False), (4, 1, True, True), (4, 1, False, False)],
)
def test_gradient_is_that_of_the_sum_over_chosen_tokens(
    llava, records, image_folder, text_only, tmp_path, size, accumulate, accepts_loss_kwargs, weights
) -> None:
    model, processor = copy.deepcopy(llava[0]), llava[1]
    model.accepts_loss_kwargs = accepts_loss_kwargs  # the Trainer's sign of a loss that is a mean per batch
    chosen = masked_records(processor, records, image_folder, text_only, weights)
    loss, gradient = explicit_gradient(model, processor, chosen, image_folder)
    before = copy.deepcopy(model.state_dict())
    args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate)
    trainer = SelectiveTrainer(model, args, train_dataset=chosen, processing_class=processor, image_folder=image_folder)
    assert trainer.train().training_loss == pytest.approx(loss, abs=1e-5)
    assert_step_was(before, model.state_dict(), gradient)
    assert args.remove_unused_columns  # the caller's arguments are not touched


@pytest.mark.parametrize(("optim", "rate"), [("sgd", 1e-2), ("adamw_torch", 1e-3)])
def test_everything_kept_is_the_ordinary_trainer(llava, records, image_folder, tmp_path, optim, rate) -> None:
    """Up to float32's rounding: a matrix product of fewer rows may add in another order.

    Adam's epsilon is large here, as it would blow up to full steps the rounding of gradients that are zero but for it.
    """
    scores = score(*llava, records, image_folder=image_folder)
    chosen = select(scores, keep=1, token_threshold=None).apply(records)
    curves, weights = [], []
    for kind, data in ((Trainer, records), (SelectiveTrainer, chosen)):
        model, processor = copy.deepcopy(llava[0]), llava[1]
        args = arguments(tmp_path, max_steps=5, optim=optim, learning_rate=rate, adam_epsilon=1e-3, remove_unused_columns=False)
        collator = SupervisedCollator(processor, 2048, image_folder)
        trainer = kind(model, args, train_dataset=data, data_collator=collator, processing_class=processor)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(model.state_dict())
    assert len(curves[0]) == 5 and curves[0] == pytest.approx(curves[1], rel=1e-6)
    apart = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    assert apart < 1e-6


def test_nothing_chosen_is_loss_zero_and_no_step(llava, records, image_folder, tmp_path) -> None:
    model, processor = copy.deepcopy(llava[0]), llava[1]
    before = copy.deepcopy(model.state_dict())
    chosen = [{**record, "token_mask": [False] * length(processor, record, image_folder)} for record in records[:4]]
    trainer = SelectiveTrainer(model, arguments(tmp_path), train_dataset=chosen, processing_class=processor, image_folder=image_folder)
    assert trainer.train().training_loss == 0.0
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert trainer.evaluate(chosen)["eval_loss"] == 0.0


def length(processor, record, image_folder) -> int:
    return int((SupervisedCollator(processor, 2048, image_folder)([record])["labels"] != -100).sum())


@pytest.mark.parametrize("weights", [False, True])
def test_evaluation_loss(llava, records, image_folder, text_only, tmp_path, weights) -> None:
    model, processor = llava
    chosen = masked_records(processor, records, image_folder, text_only, weights)
    expected, _ = explicit_gradient(model, processor, chosen, image_folder)
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = SelectiveTrainer(model, args, eval_dataset=chosen, processing_class=processor, image_folder=image_folder)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_predictions_are_the_whole_logits(llava, records, image_folder, tmp_path) -> None:
    """Who asks for logits gets those of all positions, and the loss is the same."""
    model, processor = llava
    args = arguments(tmp_path, per_device_eval_batch_size=2)
    trainer = SelectiveTrainer(model, args, processing_class=processor, image_folder=image_folder)
    expected = trainer.evaluate(records[:2])["eval_loss"]
    predicted = trainer.predict(records[:2])
    batch = trainer.data_collator(records[:2])
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    torch.testing.assert_close(torch.tensor(predicted.predictions), logits, atol=1e-5, rtol=1e-5)
    assert predicted.metrics["test_loss"] == pytest.approx(expected, abs=1e-5)
    assert trainer.evaluate(records[:2])["eval_loss"] == expected


def test_lora_step(llava, records, image_folder, text_only, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(llava[0]), config)
    chosen = masked_records(llava[1], records, image_folder, text_only)
    loss, gradient = explicit_gradient(model, llava[1], chosen, image_folder)
    before = copy.deepcopy(model.state_dict())
    args = arguments(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False})
    trainer = SelectiveTrainer(model, args, train_dataset=chosen, processing_class=llava[1], image_folder=image_folder)
    assert trainer.train().training_loss == pytest.approx(loss, abs=1e-5)
    assert_step_was(before, model.state_dict(), gradient)
    assert any("lm_head.lora_A" in name and step.any() for name, step in gradient.items())


def test_a_model_without_output_embeddings_is_refused(llava, tmp_path) -> None:
    with pytest.raises(ValueError, match="LlavaModel"):
        SelectiveTrainer(llava[0].model, arguments(tmp_path), processing_class=llava[1])


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_stopped_and_resumed_equals_one_run(llava, records, image_folder, text_only, tmp_path) -> None:
    chosen = masked_records(llava[1], records, image_folder, text_only)
    weights, tokens = [], []
    for name, callbacks in (("one", []), ("two", [StopAt()])):
        options = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "adamw_torch",
            "learning_rate": 1e-2,
        }
        args = arguments(tmp_path / name, gradient_accumulation_steps=1, lr_scheduler_type="cosine", **options)
        common = {"train_dataset": chosen, "processing_class": llava[1], "image_folder": image_folder}
        model = copy.deepcopy(llava[0])
        trainer = SelectiveTrainer(model, args, callbacks=callbacks, **common)
        trainer.train()
        if callbacks:
            stopped = trainer.supervised_tokens
            model = copy.deepcopy(llava[0])
            trainer = SelectiveTrainer(model, args, **common)
            trainer.train(resume_from_checkpoint=True)
            assert 0 < stopped < trainer.supervised_tokens
        weights.append(model.state_dict())
        tokens.append(trainer.supervised_tokens)
    assert tokens[0] == tokens[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_supervised_tokens_are_the_labels_of_all_batches(llava, records, image_folder, text_only, tmp_path) -> None:
    chosen = masked_records(llava[1], records, image_folder, text_only)
    args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=1)
    model = copy.deepcopy(llava[0])
    trainer = SelectiveTrainer(model, args, train_dataset=chosen, processing_class=llava[1], image_folder=image_folder)
    trainer.train()
    by_hand = sum(int((trainer.data_collator([record])["labels"] != -100).sum()) for record in chosen)
    assert trainer.supervised_tokens == by_hand


def test_arguments_that_change_the_loss_are_refused(llava, tmp_path) -> None:
    model, processor = llava
    with pytest.raises(ValueError, match="average_tokens_across_devices"):
        SelectiveTrainer(model, arguments(tmp_path, average_tokens_across_devices=False), processing_class=processor)
    with pytest.raises(ValueError, match="0.1"):
        SelectiveTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1), processing_class=processor)


TWO_PROCESSES = """
import sys, torch
from pathlib import Path
from support.one_step import arguments
from support.tiny_llava import build_llava
from vig import SelectiveTrainer
torch.set_num_threads(1)
out, images = Path(sys.argv[1]), sys.argv[2]
model, processor = build_llava()
in_turn = {"train_sampling_strategy": "sequential"}  # so that the first process has the first and the third record
args = arguments(out, per_device_train_batch_size=1, gradient_accumulation_steps=2, **in_turn)
chosen = torch.load(out / "records.pt", weights_only=True)
trainer = SelectiveTrainer(model, args, train_dataset=chosen, processing_class=processor, image_folder=images)
assert args.world_size == 2, args.world_size
trainer.train()
weights = {name: weight.clone() for name, weight in model.state_dict().items()}
if args.process_index == 0:
    torch.save(weights, out / "weights.pt")
    (out / "tokens").write_text(str(trainer.supervised_tokens))
torch.distributed.barrier()  # rank 0 keeps the rendezvous store, so it must not leave first
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("idle", [False, True])
def test_gradient_on_two_processes(llava, records, image_folder, text_only, tmp_path, idle) -> None:
    """One process has nothing supervised in one of its two batches, or if idle in both."""
    model, processor = llava
    chosen = masked_records(processor, records, image_folder, text_only, weights=True)  # not on every rank
    if idle:
        chosen = [chosen[0], chosen[1], chosen[2], {**chosen[3], "token_mask": [False] * length(processor, text_only, image_folder)}]
    _, gradient = explicit_gradient(model, processor, chosen, image_folder)
    torch.save(chosen, tmp_path / "records.pt")
    launch.run(TWO_PROCESSES, tmp_path, image_folder, count=2)
    assert_step_was(model.state_dict(), torch.load(tmp_path / "weights.pt", weights_only=True), gradient)
    assert int((tmp_path / "tokens").read_text()) == sum(
        int((SupervisedCollator(processor, 2048, image_folder)([record])["labels"] != -100).sum()) for record in chosen
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["no picture", "no room"])
def test_a_record_that_cannot_be_used_costs_itself_only(llava, records, image_folder, tmp_path, size, kind) -> None:
    """Batches of the bad record alone, of it and another, and of all: the step is that of the sound records."""
    (image_folder / "damaged.jpg").write_bytes(b"no picture")
    damaged = records[2] | {"id": "damaged", "image": "damaged.jpg"}
    if kind == "no room":  # before its second image there are more tokens than max_length
        turns = [{"from": "human", "value": "<image>\n" + "cat " * 3000 + "\n<image>"}, {"from": "gpt", "value": "dog"}]
        damaged = records[2] | {"id": "long", "image": [records[2]["image"]] * 2, "conversations": turns}
    sound = [records[0], records[1], records[3]]
    model, processor = copy.deepcopy(llava[0]), llava[1]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    _, gradient = explicit_gradient(model, processor, sound, image_folder)
    options = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
    trainer = SelectiveTrainer(
        model, options, processing_class=processor, image_folder=image_folder, train_dataset=[*sound[:2], damaged, sound[2]]
    )
    trainer.train()
    assert_step_was(before, dict(model.named_parameters()), gradient)
    assert trainer.data_collator.left_out == 1


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_training_on_nothing_is_no_success(llava, records, image_folder, tmp_path, padding_free) -> None:
    missing = [record | {"image": "gone.jpg"} for record in records[:2]]
    options = {"processing_class": llava[1], "image_folder": image_folder, "padding_free": padding_free}
    trainer = SelectiveTrainer(copy.deepcopy(llava[0]), arguments(tmp_path), train_dataset=missing, **options)
    with pytest.raises(ValueError, match=f"no record can be trained on.*'{records[0]['id']}'.*gone.jpg"):
        trainer.train()


def test_a_damaged_image_ends_a_strict_training(llava, records, image_folder, tmp_path) -> None:
    (image_folder / "damaged.jpg").write_bytes(b"no picture")
    damaged = records[2] | {"id": "damaged", "image": "damaged.jpg"}
    trainer = SelectiveTrainer(
        llava[0], arguments(tmp_path), processing_class=llava[1], image_folder=image_folder, train_dataset=[damaged], strict=True
    )
    with pytest.raises(ImageError, match="'damaged': .*damaged.jpg"):
        trainer.train()
