"""The same image or record gives the same result in any batch: within 1e-5 in float32, within the bounds below in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_llava import build_llava, build_records

from encoders import FeatureStore, build_encoder, encode_images
from mof.evals.answerers import LocalModel
from mof.evals.answering import Answer, Prompt
from mof.evals.decoding import load_decoding
from vig import score

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records_scored_in_any_batch(records: list[dict[str, Any]], tmp_path: Path, dtype: torch.dtype) -> None:
    options = {"image_folder": tmp_path / "images", "measures": ("loss", "entropy")}
    alone = score(*llava(dtype), records, batch_size=1, **options)
    bound = EXACT if dtype == torch.float32 else BFLOAT16["nats"]
    for size in SIZES:
        many = score(*llava(dtype), records[::-1], batch_size=size, batch_tokens=300, **options)
        for expected in alone:
            for name in ("token_vig", "token_loss", "null_token_loss", "token_entropy"):
                np.testing.assert_allclose(getattr(many[expected.id], name), getattr(expected, name), atol=bound, rtol=0)


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
