"""The whole model in a single graph: compiled for training and decoding, and exported."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchFeature, StaticCache

from mof import MoFForConditionalGeneration, MoFProcessor


@pytest.fixture
def batch(tiny_processor: MoFProcessor) -> BatchFeature:
    pixels = list(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8))
    texts = ["<image>\nWhat is it?", "First <image> then <image>?"]
    return tiny_processor(images=pixels, text=texts, padding=True, return_tensors="pt")


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_for_a_batch(tiny_model: MoFForConditionalGeneration, batch: BatchFeature, training: bool) -> None:
    tiny_model.train(training)
    whole = torch.compile(tiny_model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(**batch, labels=batch["input_ids"]).loss, tiny_model(**batch, labels=batch["input_ids"]).loss)
    with pytest.raises(RuntimeError):  # the graph has kept the check
        whole(**{**batch, "input_ids": batch["input_ids"].clamp(max=200)})


@torch.no_grad()
def test_one_graph_for_each_step_of_decoding(tiny_model: MoFForConditionalGeneration, batch: BatchFeature) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = tiny_model.generate(**batch, **options)
    steps: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: object) -> object:
        steps.append(1)
        return graph.forward

    forward = tiny_model.forward
    compiled = torch.compile(forward, backend=counting, fullgraph=True)
    tiny_model.forward = lambda **inputs: (compiled if inputs["input_ids"].shape[1] == 1 else forward)(**inputs)
    cache = StaticCache(config=tiny_model.config.text_config, max_cache_len=expected.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mof.model.MoFForConditionalGeneration._validate_model_kwargs", lambda *_: None)  # it reads forward's arguments
        assert torch.equal(tiny_model.generate(**batch, **options, cache=cache), expected)
    assert len(steps) == 1


@torch.no_grad()
def test_export(tiny_model: MoFForConditionalGeneration, batch: BatchFeature) -> None:
    inputs = {**batch, "use_cache": False}
    exported = torch.export.export(tiny_model, (), inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs).logits, tiny_model(**inputs).logits)
