"""Buckets, the shared prefix, the head at answer positions, memory that runs out: none may change a score."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import build_model
from transformers import AutoModelForCausalLM, Gemma2Config, MambaConfig, MistralConfig

import vig.nulls
import vig.scoring.pairs
from mof import MoFProcessor
from mof.data.answer_tokens import Example
from vig import score
from vig.scoring.answer_losses import AnswerLosses
from vig.scoring.batches import by_image, make_batches, windows
from vig.scoring.pairs import Pair

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}


@pytest.fixture
def many(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Three or two records on each of the five images, of different lengths."""
    more = [copy.deepcopy(record) | {"id": f"{record['id']}-{copy_}"} for copy_ in range(3) for record in records]
    for index, record in enumerate(more):
        record["conversations"][0]["value"] += " Please." * (index % 4)
    return more[:-2]


def by_id(scores: Any) -> dict[str, np.ndarray]:
    return {s.id: s.token_vig for s in scores}


def assert_same(scores: Any, expected: Any, atol: float = 1e-4) -> None:
    assert [s.id for s in scores] == [s.id for s in expected]
    for a, b in zip(scores, expected, strict=True):
        np.testing.assert_allclose(a.token_vig, b.token_vig, atol=atol)


@pytest.mark.parametrize("null", ["blur", "noise", "shuffle", "drop"])
def test_sharing_and_buckets_change_nothing(llava, many, image_folder, null, monkeypatch) -> None:
    alone = score(*llava, many, null=null, image_folder=image_folder, batch_size=1)
    assert_same(score(*llava, many, null=null, image_folder=image_folder), alone)
    assert_same(score(*llava, many, null=null, image_folder=image_folder, batch_tokens=200), alone)
    assert max(np.abs(values).max() for values in by_id(alone).values()) > 0.05
    if null != "shuffle":
        monkeypatch.setattr("vig.scoring.passes.WINDOW_BATCHES", 1)
        assert_same(score(*llava, iter(many), null=null, image_folder=image_folder, batch_size=4), alone)


def test_every_image_goes_through_the_encoder_once_per_branch(llava, many, image_folder) -> None:
    model, processor = llava
    seen = []
    handle = model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    try:
        score(model, processor, many, image_folder=image_folder)
    finally:
        handle.remove()
    images, checks = 5, 4 + 2  # at the start, two records of two groups: plainly, then with a shared prefix
    assert sum(seen) == 2 * images + checks


def test_same_image_is_exactly_zero_when_shared(llava, many, image_folder) -> None:
    assert not any(values.any() for values in by_id(score(*llava, many, null="same", image_folder=image_folder)).values())


def plain_losses(model: Any, example: Example) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=example.input_ids[None], **example.images).logits[0]
    places = example.answer_mask.nonzero().flatten().tolist()
    return [-logits[t - 1].log_softmax(-1)[example.input_ids[t]].item() for t in places]


def examples_on_one_image(processor: Any, image_folder: Any) -> list[Example]:
    from mof.data.answer_tokens import encode_record
    from mof.data.records import to_record

    turns = [("What?", "A dog."), ("Which colour is it?", "Red, I think."), ("Where", "left")]
    return [
        encode_record(
            processor,
            to_record(
                {
                    "id": question,
                    "image": "0.png",
                    "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
                },
                image_folder,
            ),
        )
        for question, answer in turns
    ]


def language_model(kind: str, vocabulary: int) -> Any:
    if kind == "sliding window":
        config = MistralConfig(**SIZES, num_key_value_heads=2, vocab_size=vocabulary, sliding_window=4)
    elif kind == "capped logits":
        config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, vocab_size=vocabulary, final_logit_softcapping=1.0)
    else:
        config = MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=vocabulary, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", ["sliding window", "capped logits", "recurrent"])
def test_what_cannot_be_shared_falls_back_and_says_so_once(kind, tiny_tokenizer, image_folder, caplog) -> None:
    """Our model around language models whose past is no list of keys and values, one of which caps its logits too."""
    model = build_model(tiny_tokenizer, language_model(kind, len(tiny_tokenizer)))
    processor = MoFProcessor.from_parts(model, tiny_tokenizer)
    examples = examples_on_one_image(processor, image_folder)
    prefix = int((examples[0].input_ids == processor.image_token_id).nonzero()[-1]) + 1
    expected = [loss for example in examples for loss in plain_losses(model, example)]
    losses = AnswerLosses(model, 0)
    for _ in range(2):
        np.testing.assert_allclose(losses([examples], prefix).numpy(), expected, atol=1e-4)
    (said,) = (record.getMessage() for record in caplog.records if record.name == "vig.scoring.answer_losses")
    assert "for every record anew" in said
    assert losses._head is not None  # logits still exist at answer positions only
    assert losses._untouched == (kind != "capped logits")


def test_logits_that_the_model_changes_in_place(llava, image_folder, monkeypatch) -> None:
    model, processor = llava
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits.mul_(0.5)
        return output

    monkeypatch.setattr(model, "forward", scaled)
    examples = examples_on_one_image(processor, image_folder)
    losses = AnswerLosses(model, 0)
    expected = [loss for example in examples for loss in plain_losses(model, example)]
    np.testing.assert_allclose(losses([[example] for example in examples], 0).numpy(), expected, atol=1e-4)
    assert losses._head is not None and not losses._untouched


def test_losses_that_depend_on_the_batch_do_not_end_the_fast_way(llava, image_folder, monkeypatch, caplog) -> None:
    """In half precision, the losses of an example differ by up to 0.07 nats between batches of other sizes."""
    model, processor = llava
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits.mul_(1 + 0.3 * len(kwargs["input_ids"]))
        return output

    monkeypatch.setattr(model, "forward", scaled)
    examples = examples_on_one_image(processor, image_folder)
    prefix = int((examples[0].input_ids == processor.image_token_id).nonzero()[-1]) + 1
    assert len(AnswerLosses(model, 0)([examples], prefix)) == sum(int(example.answer_mask.sum()) for example in examples)
    assert not caplog.text


def test_a_past_that_is_not_the_same_is_not_used(llava, many, image_folder, monkeypatch, caplog) -> None:
    model, processor = llava
    alone = score(model, processor, many, image_folder=image_folder, batch_size=1)
    body = model.model.language_model
    forward = body.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        past = kwargs.get("cache", kwargs.get("past_key_values"))  # the name depends on the version of transformers
        if past is not None and past.get_seq_length():
            kwargs["position_ids"] = torch.arange(kwargs["inputs_embeds"].shape[1])[None]  # as if nothing came before
        return forward(*args, **kwargs)

    monkeypatch.setattr(body, "forward", shifted)
    with caplog.at_level(logging.WARNING, "vig"):
        assert_same(score(model, processor, many, image_folder=image_folder), alone)
    assert caplog.text.count("differs by") == 1


def test_a_model_with_another_head_is_scored_plainly(llava, many, image_folder, monkeypatch, caplog) -> None:
    model, processor = llava
    expected = score(model, processor, many, image_folder=image_folder)
    other = torch.nn.Linear(32, 7)  # not what makes the logits
    monkeypatch.setattr(model, "get_output_embeddings", lambda: other)
    assert_same(score(model, processor, many, image_folder=image_folder), expected)
    assert "makes the logits of all positions" in caplog.text


def test_image_that_is_not_first_is_not_shared(llava, image_folder) -> None:
    turns = ["What is two and two?", "Four.", "<image>\nAnd this?", "A dog."]
    conversations = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    records = [
        {"id": str(i), "image": "1.png", "conversations": [*conversations[:3], {"from": "gpt", "value": f"Dog {i}"}]} for i in range(3)
    ]
    assert_same(score(*llava, records, image_folder=image_folder), score(*llava, records, image_folder=image_folder, batch_size=1))


def test_out_of_memory_halves_the_batches(llava, many, image_folder, monkeypatch, caplog) -> None:
    model, processor = llava
    expected = score(model, processor, many, image_folder=image_folder)
    forward, sizes = model.forward, []

    def limited(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs["input_ids"].numel()
        if tokens > 130:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(tokens)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", limited)
    with caplog.at_level(logging.WARNING, "vig"):
        assert_same(score(model, processor, many, image_folder=image_folder, batch_tokens=2000), expected)
    halved = caplog.text.count("going on with half as many")
    assert 1 <= halved <= 5 and max(sizes) > 65  # found out once, and not for every window or batch


def test_a_record_that_does_not_fit_alone_is_a_failure(llava, many, image_folder, monkeypatch) -> None:
    model, processor = llava
    long = copy.deepcopy(many[0]) | {"id": "long"}
    long["conversations"][1]["value"] = "very " * 60 + "long"
    forward = model.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].numel() > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", limited)
    scores = score(model, processor, [long, *many], image_folder=image_folder)
    assert scores.ids == [record["id"] for record in many]
    assert "out of memory" in scores.failures["long"]


def pair(index: int, length: int, image: int, prefix: int) -> Pair:
    ids = torch.cat([torch.full((prefix,), 1), torch.full((length,), 2)])
    example = Example(str(index), ids, torch.arange(len(ids)) > prefix, {})
    return Pair(str(index), "", example, example, np.array([]), str(image), prefix)


@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(0, 3), st.sampled_from([0, 5, 9])), max_size=20),
    st.integers(1, 120),
    st.integers(1, 9),
)
def test_every_record_is_in_one_batch_that_fits(shapes, batch_tokens, batch_size) -> None:
    pairs = [pair(index, *shape) for index, shape in enumerate(shapes)]
    batches = make_batches(pairs, batch_tokens, batch_size)
    assert sorted(p.id for batch in batches for p in batch.pairs) == sorted(p.id for p in pairs)
    for batch in batches:
        lengths = [len(p.clean.input_ids) for p in batch.pairs]
        computed = batch.prefix * len(batch.groups) + (max(lengths) - batch.prefix) * len(lengths)
        assert len(lengths) == 1 or (computed <= batch_tokens and len(lengths) <= batch_size)
        for group in batch.groups:
            assert len({(p.images, p.prefix) for p in group}) == 1
            assert batch.prefix in (0, group[0].prefix) and (batch.prefix == 0) == (len(group) == 1 or group[0].prefix == 0)


def test_records_on_one_image_become_neighbours() -> None:
    records = [{"id": i, "image": image} for i, image in enumerate(["b", "a", "b", ["c", "a"], "a", None, ["c", "a"], "b"])]
    assert [record["id"] for record in by_image(records)] == [0, 2, 7, 1, 4, 3, 6, 5]


def test_windows_are_cut_by_tokens_and_by_records() -> None:
    pairs = [pair(i, 10, 0, 0) for i in range(5)]
    assert [len(window) for window in windows([*pairs, None, None], 20, 100)] == [2, 2, 3]
    assert [len(window) for window in windows([*pairs, None, None], 1000, 3)] == [3, 3, 1]


def test_each_image_is_decoded_once_and_blurred_once(llava, records, image_folder, monkeypatch) -> None:
    """Twelve records on three images, and no two neighbours on the same image."""
    many = [{**record, "id": f"{record['id']}-{copy}"} for copy in range(4) for record in records[:3]]
    assert len({record["image"] for record in many}) == 3
    calls = Counter[str]()

    def counted(name: str, function):
        return lambda *args: calls.update([name]) or function(*args)

    monkeypatch.setattr(vig.scoring.pairs, "read_image", counted("decoded", vig.scoring.pairs.read_image))
    monkeypatch.setattr(vig.nulls, "blur", counted("blurred", vig.nulls.blur))
    assert len(score(*llava, many, image_folder=image_folder)) == 12
    assert calls == {"decoded": 3, "blurred": 3}
