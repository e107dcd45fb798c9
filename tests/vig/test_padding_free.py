"""Records in one row without padding against the same records in padded rows."""

import copy

import pytest
import torch
from support.one_step import arguments, assert_step_was, explicit_gradient, masked_records
from support.plain_loss import batch, build

from mof.data.collator import SupervisedCollator
from vig import SelectiveTrainer
from vig.training import finetune
from vig.training.padding_free import PaddingFreeCollator, flatten, keeps_records_apart, unflatten


def test_flat_and_back() -> None:
    inputs, labels = batch()
    labels[:, 0] = inputs["input_ids"][:, 0]  # first tokens of rows are never predicted, and must not be of the row before
    padded = {**inputs, "labels": labels, "pixel_values": torch.rand(2, 3, 4, 4)}
    flat = flatten(padded)
    assert flat["position_ids"].tolist() == [[*range(12), *range(12), *range(8)]]
    assert flat["input_ids"][0].tolist() == [t for row, n in zip(inputs["input_ids"].tolist(), (12, 12, 8), strict=True) for t in row[:n]]
    assert "attention_mask" not in flat and flat["pixel_values"] is padded["pixel_values"]
    assert (flat["labels"] != -100).sum() == (labels[:, 1:] != -100).sum()
    back = unflatten(flat)
    attended = inputs["attention_mask"].bool()
    assert torch.equal(back["attention_mask"], inputs["attention_mask"])
    assert torch.equal(back["input_ids"][attended], inputs["input_ids"][attended])
    assert torch.equal(back["labels"][:, 1:], labels[:, 1:])
    left = flatten({key: value.flip(1) if value.ndim == 2 else value for key, value in padded.items()})  # padding on the left
    assert left["position_ids"].tolist() == flat["position_ids"].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llava", "LlavaOnevision", "Idefics3", "InternVL", "Qwen2_5_VL"])
def test_models_are_told_apart(name, attention) -> None:
    model = build(name)
    model.set_attn_implementation(attention)
    flat = flatten(batch()[0])
    assert keeps_records_apart(model, model.get_output_embeddings(), flat | {"use_cache": False}) == (name != "Qwen2_5_VL")


def test_step(llava, records, image_folder, text_only, tmp_path) -> None:
    chosen = masked_records(llava[1], records, image_folder, text_only, weights=True)
    loss, gradient = explicit_gradient(llava[0], llava[1], chosen, image_folder)
    model = copy.deepcopy(llava[0])
    before = copy.deepcopy(model.state_dict())
    options = {"train_dataset": chosen, "processing_class": llava[1], "image_folder": image_folder, "padding_free": True}
    trainer = SelectiveTrainer(model, arguments(tmp_path), **options)
    assert trainer.train().training_loss == pytest.approx(loss, abs=1e-5)
    assert_step_was(before, model.state_dict(), gradient)


def test_our_model(tiny_model, tiny_processor, records, image_folder, text_only, tmp_path) -> None:
    chosen = masked_records(tiny_processor, records, image_folder, text_only)
    loss, gradient = explicit_gradient(tiny_model, tiny_processor, chosen, image_folder)
    before = copy.deepcopy(tiny_model.state_dict())
    options = {"train_dataset": chosen, "processing_class": tiny_processor, "image_folder": image_folder, "padding_free": True}
    trainer = SelectiveTrainer(tiny_model, arguments(tmp_path), **options)
    assert trainer.train().training_loss == pytest.approx(loss, abs=1e-5)
    assert_step_was(before, tiny_model.state_dict(), gradient)


def test_a_model_that_reads_on_is_refused(llava, records, image_folder, tmp_path) -> None:
    class ReadsOn(type(llava[0])):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    model = copy.deepcopy(llava[0])
    model.__class__ = ReadsOn
    options = {"train_dataset": records, "processing_class": llava[1], "image_folder": image_folder, "padding_free": True}
    with pytest.raises(ValueError, match="ReadsOn"):
        SelectiveTrainer(model, arguments(tmp_path), **options).train()


def test_records_of_the_collator(llava, records, image_folder) -> None:
    plain = SupervisedCollator(llava[1], 2048, image_folder)
    flat = PaddingFreeCollator(plain)(records)
    assert flat["input_ids"].shape == (1, sum(plain([record])["input_ids"].numel() for record in records))


def test_fine_tuning_without_padding(llava, records, image_folder, tmp_path, monkeypatch) -> None:
    """The same weights as with padding, from batches of one row."""
    rows, step = [], SelectiveTrainer.training_step
    watch = lambda self, model, inputs, *rest: rows.append(len(inputs["input_ids"])) or step(self, model, inputs, *rest)  # noqa: E731
    monkeypatch.setattr(SelectiveTrainer, "training_step", watch)
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    trained = []
    for padding_free in (False, True):
        model = copy.deepcopy(llava[0])
        options = {"image_folder": image_folder, "padding_free": padding_free}
        folder = tmp_path / str(padding_free)
        finetune(model, llava[1], records[:4], folder, trainer_options=options, dataloader_num_workers=0, **sgd)
        trained.append(model.state_dict())
    assert rows == [2, 2, 1, 1]
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, atol=1e-5, rtol=1e-4)
    assert not torch.equal(trained[0]["lm_head.weight"], llava[0].lm_head.weight)
