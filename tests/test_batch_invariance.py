"""The same image or record gives the same result in any batch: within 1e-5 in float32, within the bounds below in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_llava import build_llava, build_records
from transformers import TrainingArguments

from encoders import FeatureStore, build_encoder, encode_images, read_image
from mof import probe_mmvp_vlm
from mof.evals import mmvp
from mof.evals.answerers import LocalModel
from mof.evals.answering import Answer, Prompt
from mof.evals.decoding import load_decoding
from mof.evals.run import Run
from mof.miniature.benchmarks import write_benchmarks
from vig import SelectiveTrainer, score

EXACT = 1e-5
BFLOAT16 = {"embeddings": 0.02, "nats": 0.25}
"""bfloat16 keeps 8 bits. A unit vector moves by at most 0.02, the loss of a token of these wild random models by 0.25 nats."""
SIZES = (2, 5, 12)


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    """Twelve records whose lengths differ by a factor of five, on images of several sizes."""
    return build_records(tmp_path / "images", 12)


def llava(dtype: torch.dtype) -> tuple[Any, Any]:
    model, processor = build_llava()
    return model.to(dtype), processor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_encoded_in_any_batch(records: list[dict[str, Any]], tmp_path: Path, dtype: torch.dtype) -> None:
    encoders = {name: build_encoder(name) for name in ("mini-clip", "mini-dino")}
    stores = []
    for size in (1, *SIZES):
        options = {"tokens": "float16", "batch_size": size, "dtype": dtype, "progress": False}
        encode_images(tmp_path / "images", encoders, tmp_path / f"{size}", **options)
        stores.append(FeatureStore(tmp_path / f"{size}"))
    alone, *others = stores
    bound = EXACT if dtype == torch.float32 else BFLOAT16["embeddings"]
    for other in others:
        assert other.names == alone.names
        for name in encoders:
            np.testing.assert_allclose(other.embeddings(name), alone.embeddings(name), atol=bound, rtol=0)
            stored = (store.tokens(name, slice(None)).float() for store in (other, alone))
            torch.testing.assert_close(*stored, atol=0.25 if dtype == torch.bfloat16 else 2e-3, rtol=2**-9)  # a step of float16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records_scored_in_any_batch(records: list[dict[str, Any]], tmp_path: Path, dtype: torch.dtype) -> None:
    """Also for records of two images beside records of an image, in buckets of few and of many tokens, padded on either side."""
    options = {"image_folder": tmp_path / "images", "measures": ("loss", "entropy")}
    for number in (2, 7):
        records[number]["image"] = [records[number]["image"], records[0]["image"]]
        records[number]["conversations"][0]["value"] = "<image>\n" + records[number]["conversations"][0]["value"]
    alone = score(*llava(dtype), records, batch_size=1, **options)
    bound = EXACT if dtype == torch.float32 else BFLOAT16["nats"]
    for size, tokens, side in ((2, 300, "right"), (5, 300, "left"), (12, 300, "right"), (12, 16384, "left")):
        model, processor = llava(dtype)
        processor.tokenizer.padding_side = side
        many = score(model, processor, records[::-1], batch_size=size, batch_tokens=tokens, **options)
        for expected in alone:
            for name in ("token_vig", "token_loss", "null_token_loss", "token_entropy"):
                np.testing.assert_allclose(getattr(many[expected.id], name), getattr(expected, name), atol=bound, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [None, "vcd", "pai:first_layer=0"])
def test_prompts_answered_in_any_batch(records: list[dict[str, Any]], tmp_path: Path, decoding: str | None) -> None:
    questions = [record["conversations"][0]["value"].removeprefix("<image>\n") * (1 + n % 4) for n, record in enumerate(records)]
    prompts = [
        Prompt.about(record["id"], str(tmp_path / "images" / record["image"]), question, ("left", "right, behind the chair"))
        for record, question in zip(records, questions, strict=True)
    ]

    def answers(size: int) -> list[Answer]:
        model = LocalModel(*llava(torch.float32), "tiny", batch_size=size, max_new_tokens=6, decoding=load_decoding(decoding))
        return [answer for _, answer in sorted(model.answer(prompts), key=lambda pair: pair[0])]

    alone = answers(1)
    assert len({answer.text for answer in alone}) > 1, alone[0].error
    for size in SIZES:
        for expected, answer in zip(alone, answers(size), strict=True):
            assert (answer.text, answer.error, answer.output_tokens) == (expected.text, None, expected.output_tokens)
            if decoding is None:
                np.testing.assert_allclose(answer.log_likelihoods, expected.log_likelihoods, atol=EXACT, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_with_any_number_of_images_answered_in_any_batch(records: list[dict[str, Any]], tmp_path: Path, dtype: torch.dtype) -> None:
    """Prompts of none to three images stand in a batch, padded on the left. In bfloat16, tokens that are nearly as likely as each other may
    change places, so the likelihoods of first tokens are compared. The options of a prompt are a batch of their own in any case."""
    paths, prompts = [tmp_path / "images" / record["image"] for record in records], list[Prompt]()
    for number, record in enumerate(records):
        images = paths[number : number + number % 4]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What is it? " * (1 + number % 3)}]
        prompts.append(Prompt(record["id"], [{"role": "user", "content": content}], images, ("left", "right, behind the chair")))
    chats = [prompt.filled(lambda image: {"type": "image", "image": read_image(image)}) for prompt in prompts]

    def answered(size: int) -> tuple[list[Answer], torch.Tensor]:
        local = LocalModel(*llava(dtype), "tiny", batch_size=size, max_new_tokens=1)
        first = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        batches = (local.encode(chats[start : start + size]) for start in range(0, len(chats), size))
        logits = torch.cat([local.model.generate(**inputs, **first).logits[0] for inputs in batches])  # [prompts, vocabulary]
        return [answer for _, answer in sorted(local.answer(prompts), key=lambda pair: pair[0])], logits.float().log_softmax(1)

    alone, expected = answered(1)
    assert not any(answer.error for answer in alone), [answer.error for answer in alone]
    likeliest = expected.topk(5).indices
    bound = EXACT if dtype == torch.float32 else BFLOAT16["nats"]
    sure = -expected.topk(2).values.diff()[:, 0] > 2 * bound  # [prompts]
    assert sure.sum() >= 4
    for size in SIZES:
        many, logits = answered(size)
        torch.testing.assert_close(logits.gather(1, likeliest), expected.gather(1, likeliest), atol=bound, rtol=0)
        for answer, other, is_sure in zip(many, alone, sure, strict=True):
            assert answer.log_likelihoods == other.log_likelihoods and (answer.text == other.text or not is_sure)


@pytest.mark.slow
def test_pairs_answered_in_any_batch(tmp_path: Path) -> None:
    write_benchmarks(tmp_path / "drawn", pairs=2, scenes=1)
    questions = mmvp.read_mmvp(tmp_path / "drawn/MMVP")
    rows = []
    for size in (1, *SIZES):
        model = LocalModel(*llava(torch.float32), "tiny", batch_size=size, max_new_tokens=6)
        result = mmvp.eval_mmvp(Run(tmp_path / f"{size}", model), questions)
        rows.append((result["pair_accuracy"], [json.loads(line) for line in (tmp_path / f"{size}/answers.jsonl").read_text().splitlines()]))
    for accuracy, answers in rows[1:]:
        assert accuracy == rows[0][0]
        for answer, expected in zip(answers, rows[0][1], strict=True):
            assert answer.pop("log_likelihoods") == pytest.approx(expected["log_likelihoods"], abs=EXACT)
            assert answer == {name: value for name, value in expected.items() if name != "log_likelihoods"}


def test_a_probe_of_images_encoded_in_any_batch(tmp_path: Path) -> None:
    write_benchmarks(tmp_path / "drawn", pairs=2, scenes=1)
    clip, folder = build_encoder("mini-clip"), tmp_path / "drawn/MMVP_VLM"
    alone = probe_mmvp_vlm(clip, folder)
    for size in SIZES:
        encode_images(folder, {"mini-clip": clip}, tmp_path / f"{size}", batch_size=size, progress=False)
        many = probe_mmvp_vlm(clip, folder, store=FeatureStore(tmp_path / f"{size}"))
        assert many.by_pattern == alone.by_pattern
        assert many.image_similarity == pytest.approx(alone.image_similarity, abs=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_losses_in_any_batch(records: list[dict[str, Any]], tmp_path: Path, dtype: torch.dtype) -> None:
    """A batch's loss is the mean over its tokens of the losses that its records have alone."""
    model, processor = llava(dtype)
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    trainer = SelectiveTrainer(model.eval(), arguments, processing_class=processor, image_folder=tmp_path / "images")

    def loss(chosen: list[dict[str, Any]]) -> tuple[float, int]:
        batch = trainer.data_collator(chosen)
        count = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.model, batch)), count

    alone = [loss([record]) for record in records]
    assert max(alone)[0] > min(alone)[0] + 0.5
    for size in SIZES:
        for start in range(0, len(records), size):
            values, counts = np.array(alone[start : start + size]).T
            expected = np.average(values, weights=counts)
            assert loss(records[start : start + size])[0] == pytest.approx(
                expected, abs=EXACT if dtype == torch.float32 else BFLOAT16["nats"]
            )
