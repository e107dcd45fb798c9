"""VIG with our own model: the whole way from records through scores and a selection to a training step."""

import copy

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from vig import SelectiveTrainer, load_scores, score, select


def test_same_image_and_batching(tiny_model, tiny_processor, records, image_folder, text_only) -> None:
    parts, images = (tiny_model, tiny_processor), {"image_folder": image_folder}
    same = score(*parts, [text_only, *records], null="same", batch_size=3, **images)
    assert same.ids == [record["id"] for record in records]
    assert not np.concatenate([s.token_vig for s in same]).any()
    assert all(len(s.turn_ends) == len(record["conversations"]) // 2 for s, record in zip(same, records, strict=True))
    batched, single = (score(*parts, records, batch_size=size, **images) for size in (5, 1))
    for a, b in zip(batched, single, strict=True):
        np.testing.assert_allclose(a.token_vig, b.token_vig, atol=1e-5)
        assert a.token_vig.any()


def test_score_is_the_models_own_loss(tiny_model, tiny_processor, records, image_folder) -> None:
    from mof.data.collator import SupervisedCollator

    collator = SupervisedCollator(tiny_processor, 2048, image_folder)
    for record, s in zip(records, score(tiny_model, tiny_processor, records, image_folder=image_folder), strict=True):
        with torch.no_grad():
            assert s.loss == pytest.approx(tiny_model(**collator([record])).loss.item(), abs=1e-5)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_train_killed_and_resumed_equals_one_run(tiny_model, tiny_processor, records, image_folder, text_only, tmp_path) -> None:
    scores = score(tiny_model, tiny_processor, records, tmp_path / "scores", image_folder=image_folder)
    chosen = select(load_scores(tmp_path / "scores"), keep=0.5).apply([*records, text_only])
    assert len(chosen) == 4  # three of five, and the text-only record
    assert len(chosen[0]["token_mask"]) == len(scores[scores.ids.index(chosen[0]["id"])].token_vig)
    weights = []
    for name in ("one", "two"):
        options = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 1}
        quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
        args = TrainingArguments(str(tmp_path / name), save_strategy="steps", **options, **quiet)
        common = {"train_dataset": chosen, "processing_class": tiny_processor, "image_folder": image_folder}
        model = copy.deepcopy(tiny_model)
        if name == "two":

            class Dies(SelectiveTrainer):
                def training_step(self, *step, **kwargs):
                    if self.state.global_step == 3:  # one step after the checkpoint
                        raise Killed
                    return super().training_step(*step, **kwargs)

            with pytest.raises(Killed):
                Dies(model, args, **common).train()
            model = copy.deepcopy(tiny_model)
        SelectiveTrainer(model, args, **common).train(resume_from_checkpoint=name == "two")
        weights.append(model.state_dict())
    before = tiny_model.state_dict()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in before)
    changed = {key for key in before if not torch.equal(before[key], weights[0][key])}
    assert any("adapters" in key for key in changed) and not any(".encoders." in key for key in changed)
