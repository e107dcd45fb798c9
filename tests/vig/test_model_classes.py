"""Nine families of transformers, each scored and compared with two plain forward passes written here."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from support.families import FAMILIES, build, make_records
from torch.nn import functional as F

from encoders.images.reading import blur
from mof.data.answer_tokens import encode_record
from mof.data.records import RecordError, to_record
from vig import score
from vig.scoring.answer_losses import AnswerLosses


def plain_losses(model: Any, processor: Any, record: dict[str, Any], images: list[Image.Image]) -> tuple[list[float], list[int]]:
    """One record, one forward pass, logits of all positions. Answers are found by their text, from the end of the record."""
    messages, eos = record["messages"], processor.tokenizer.eos_token
    pieces = ["assistant:" + text for m in messages if m["role"] == "assistant" for text in [f" {m['content'][0]['text']}{eos}"]]
    text = processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)
    if isinstance(processor, tf.PaliGemmaProcessor):
        prompt, answer = text.split("assistant:")
        inputs = processor(text=[prompt + "assistant:"], images=images, suffix=[answer.removesuffix(eos)], return_tensors="pt")
        inputs.pop("labels")
        pieces = [answer]
    else:
        inputs = processor(text=[text], images=images, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    positions: list[int] = []
    start = 0
    for piece in pieces:
        whole = processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
        skip = len(processor.tokenizer("assistant:", add_special_tokens=False)["input_ids"]) if piece.startswith("assistant:") else 0
        start = next(at for at in range(start, len(ids)) if ids[at : at + len(whole)] == whole)
        positions += range(start + skip, start + len(whole))
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return [F.cross_entropy(logits[t - 1][None], torch.tensor([ids[t]])).item() for t in positions], [ids[t] for t in positions]


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_two_plain_forwards(family: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build(family)
    records = make_records(turns=1 if family == "paligemma" else 2)
    shared, losses = [], AnswerLosses._losses
    monkeypatch.setattr(AnswerLosses, "_losses", lambda self, *args: shared.append(args[1]) or losses(self, *args))
    with caplog.at_level(logging.WARNING, "vig"):
        scores = score(model, processor, records)
    # What comes before the question is shared, except where image and question see each other. All without falling back.
    assert any(shared) == (family != "paligemma") and not [r for r in caplog.records if r.name.startswith("vig")]
    assert not scores.failures
    assert scores.ids == [record["id"] for record in records]
    for record, s in zip(records, scores, strict=True):
        image = record["images"][0]
        loss, ids = plain_losses(model, processor, record, [image])
        null_loss, _ = plain_losses(model, processor, record, [blur(image)])
        assert s.token_ids.tolist() == ids
        np.testing.assert_allclose(s.token_vig, np.array(null_loss) - np.array(loss), atol=1e-4)
    assert np.abs(np.concatenate([s.token_vig for s in scores])).max() > 0.02  # the image matters to this model


@pytest.mark.parametrize("first", [0, 1])  # the first image fills all of its four tiles, the second three of them
def test_images_attended_to_from_the_side(first: int, caplog: pytest.LogCaptureFixture) -> None:
    """Llama 3.2 has a mask of tokens by images, which belongs to the record and not to its images, and nothing to share."""
    model, processor = build("mllama")
    records = make_records(turns=1)
    records = records[first:] + records[:first]
    with caplog.at_level(logging.WARNING, "vig"):
        scores = score(model, processor, records, batch_size=3)
    warned = [r.message for r in caplog.records if r.name.startswith("vig")]
    assert ["before the question for every record anew" in message for message in warned] == [True] and not scores.failures
    for record, s in zip(records, scores, strict=True):
        (loss, ids), (null_loss, _) = (
            plain_losses(model, processor, record, [one]) for one in (record["images"][0], blur(record["images"][0]))
        )
        assert s.token_ids.tolist() == ids
        np.testing.assert_allclose(s.token_vig, np.array(null_loss) - np.array(loss), atol=1e-4)


def test_a_processor_that_needs_images_says_so_without_them() -> None:
    model, processor = build("paligemma")
    failures = score(model, processor, make_records(turns=1)[:1], null="drop").failures
    assert failures == {"0": "record '0' has no image, but PaliGemmaProcessor takes an image with each question"}


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_order_and_sharing_change_nothing(family: str) -> None:
    model, processor = build(family)
    records = make_records(turns=1)
    expected = {s.id: s for s in score(model, processor, records, batch_size=1)}
    for some, options in [
        (records[::-1], {}),
        (records, {"batch_tokens": 150}),
        (iter(records[3:] + records[:3]), {"batch_size": 2}),
    ]:
        scores = score(model, processor, some, **options)
        assert len(scores) == len(records)
        for s in scores:
            np.testing.assert_allclose(s.token_vig, expected[s.id].token_vig, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_image_gives_exactly_zero(family: str) -> None:
    model, processor = build(family)
    scores = score(model, processor, make_records(turns=1), null="same")
    assert len(scores) == 6 and not any(s.token_vig.any() for s in scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_moves_scores_a_little(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """2 to 4 % of the mean size of a token VIG here; no way of scoring is given up for what is only rounding."""
    model, processor = build(family)
    records = make_records(turns=1)
    exact = np.concatenate([s.token_vig for s in score(model, processor, records)])
    with caplog.at_level(logging.WARNING, "vig"):
        rounded = np.concatenate([s.token_vig for s in score(model.to(torch.bfloat16), processor, records)])
    assert 0 < np.abs(rounded - exact).mean() < 0.1 * np.abs(exact).mean()
    assert not [r for r in caplog.records if r.name.startswith("vig")]


@pytest.mark.parametrize("family", ["gemma3", "ovis2", "blip2"])
def test_a_placeholder_that_is_no_image_token(family: str) -> None:
    model, processor = build(family)
    records = make_records(turns=1)
    scores = score(model, processor, records)
    assert not scores.failures
    for record, s in zip(records, scores, strict=True):
        loss, ids = plain_losses(model, processor, record, record["images"])
        assert s.token_ids.tolist() == ids and s.loss == pytest.approx(np.mean(loss), abs=1e-4)
    example = encode_record(processor, to_record(records[0]))
    assert 0 < example.images_end <= int(example.answer_mask.nonzero()[0])
    with pytest.raises(RecordError, match=f"'{records[0]['id']}'.*max_length is {example.images_end - 1}"):
        encode_record(processor, to_record(records[0]), max_length=example.images_end - 1)
    with pytest.raises(RecordError, match=f"answer tokens lies within max_length={example.images_end}"):
        encode_record(processor, to_record(records[0]), max_length=example.images_end)
