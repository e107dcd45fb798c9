"""Llama 3.2 Vision: records with no, one and two images in a batch get what transformers, unchanged, gives each of them alone."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import build, picture
from support.one_step import arguments
from support.two_passes import TOKENS, chats, encoder, settings
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin
from transformers.models.mllama import modeling_mllama

from encoders.images.reading import blur
from mof.data.collator import SupervisedCollator
from mof.data.prompts import ready_for_prompts
from mof.evals.answerers import LocalModel
from mof.evals.answering import Prompt
from vig import SelectiveTrainer, score

Model = tuple[PreTrainedModel, ProcessorMixin, PreTrainedModel]
ANSWERS = ("Yes.", "A red bus in front of a house.", "left", "No, three dogs.")
NUMBERS = (1, 0, 2, 1)  # images


@cache
def untouched_module() -> Any:
    spec = importlib.util.spec_from_file_location("transformers.models.mllama.untouched", modeling_mllama.__file__)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # transformers looks its classes up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["sdpa", "eager"])
def mllama(request: pytest.FixtureRequest) -> Model:
    """The model, its processor, and the same model from a second copy of transformers' module, which nothing mends."""
    model, processor = build("mllama")
    model.set_attn_implementation(request.param)
    module = untouched_module()
    plain = module.MllamaForConditionalGeneration(model.config).eval()
    plain.load_state_dict(model.state_dict())
    return model, processor, plain


@pytest.fixture
def records() -> list[dict[str, Any]]:
    made = []
    for row, (count, answer) in enumerate(zip(NUMBERS, ANSWERS, strict=True)):
        asked = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": "Which?"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        images = [picture(10 * row + i, ((60, 40), (40, 80))[(row + i) % 2]) for i in range(count)]
        made.append({"id": str(row), "images": images, "messages": messages})
    return made


def losses(model: Any, processor: Any, records: list[dict[str, Any]], max_length: int = 2048) -> list[torch.Tensor]:
    """The losses of each record's answer tokens."""
    batch = SupervisedCollator(processor, max_length, strict=True)(records)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    each = [F.cross_entropy(row[:-1], own[1:], reduction="none", ignore_index=-100) for row, own in zip(logits, labels, strict=True)]
    return [row[own[1:] != -100] for row, own in zip(each, labels, strict=True)]


@pytest.mark.parametrize("chosen", [(0, 1), (1, 0), (0, 2), (3, 2, 1, 0)])
@pytest.mark.parametrize("max_length", [2048, 45])
def test_training_batches(chosen: tuple[int, ...], max_length: int, mllama: Model, records: list[dict[str, Any]]) -> None:
    model, processor, plain = mllama
    some = [records[i] for i in chosen]
    alone = [losses(plain, processor, [record], max_length)[0] for record in some]
    torch.testing.assert_close(losses(model, processor, some, max_length), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_an_evaluation_while_training(size: int, mllama: Model, records: list[dict[str, Any]], tmp_path: Path) -> None:
    model, processor, plain = mllama
    args = arguments(tmp_path, per_device_eval_batch_size=size)
    found = SelectiveTrainer(model, args, eval_dataset=records, processing_class=processor).evaluate()["eval_loss"]
    expected = torch.cat([losses(plain, processor, [record])[0] for record in records]).mean().item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_gradients(mllama: Model, records: list[dict[str, Any]]) -> None:
    """The sum of the losses of a batch has the gradients that the records have alone, in sum."""
    model, processor, plain = mllama
    for network, batches in ((model, [records]), (plain, [[record] for record in records])):
        for batch in map(SupervisedCollator(processor, strict=True), batches):
            labels = batch.pop("labels")[:, 1:].flatten()
            F.cross_entropy(network(**batch).logits[:, :-1].flatten(0, 1), labels, reduction="sum").backward()
    for (name, own), (_, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(own.grad, expected.grad, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_scores(mllama: Model, records: list[dict[str, Any]]) -> None:
    model, processor, plain = mllama
    scores = score(model, processor, records, batch_size=4)
    assert not scores.failures and len(scores) == 3  # a text has no score
    for s in scores:
        record = records[int(s.id)]
        blurred = {**record, "images": [blur(image) for image in record["images"]]}
        clean, null = (losses(plain, processor, [shown])[0] for shown in (record, blurred))
        np.testing.assert_allclose(s.token_vig, null - clean, atol=1e-5)
        assert s.loss == pytest.approx(clean.mean().item(), abs=1e-5)


def test_answers(mllama: Model) -> None:
    model, processor, plain = mllama
    prompts = []
    for row, count in enumerate(NUMBERS):
        asked = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": "Which? " * (row + 1)}]
        images = [picture(10 * row + i, (60, 40)) for i in range(count)]
        prompts.append(Prompt(str(row), [{"role": "user", "content": asked}], images, ("yes", "no, never")))
    together = dict(LocalModel(model, processor, "batches", batch_size=4, max_new_tokens=TOKENS).answer(prompts))
    alone = dict(LocalModel(plain, processor, "alone", batch_size=1, max_new_tokens=TOKENS).answer(prompts))
    for row in range(len(NUMBERS)):
        assert together[row].error is None and together[row].text == alone[row].text
        assert together[row].log_likelihoods == pytest.approx(alone[row].log_likelihoods, abs=1e-4)


def test_generation_with_different_numbers_of_images(mllama: Model) -> None:
    model, processor, plain = mllama
    encode, asked = encoder(processor), chats((1, 2, 1))
    ready_for_prompts(processor)
    together = model.generate(**encode(asked), **settings(processor)).logits
    for row, chat in enumerate(asked):
        alone = plain.generate(**encode([chat]), **settings(processor)).logits
        for step, logits in enumerate(together):
            torch.testing.assert_close(logits[row], alone[step][0], atol=1e-5, rtol=1e-5)
