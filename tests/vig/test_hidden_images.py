"""The null "attention": the losses are those of an attention written here, in which no token sees an image token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.families import build, make_records
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mof.data.answer_tokens import encode_record
from mof.data.collator import collate
from mof.data.records import to_record
from vig import score
from vig.decoding import VCD

HIDDEN: list[Tensor] = []
"""The image tokens [T] of the record in hand."""


def dense(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, scaling: float, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """softmax(QK' + mask) V with a mask [T, T] of all pairs of tokens; the mask of the model is not looked at."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))  # [1, H, T, E]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & ~HIDDEN[-1]  # [T, T]
    seen |= torch.eye(length, dtype=torch.bool) & HIDDEN[-1][:, None]  # a row needs an entry; nobody reads these rows
    weights = (query @ key.mT * scaling).masked_fill(~seen, float("-inf")).softmax(-1)  # [1, H, T, T]
    return (weights @ value).transpose(1, 2), weights


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm", "internvl"])
def test_hidden_images_equal_a_dense_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build(family)
    records = make_records(turns=2)
    scores = score(model, processor, records, null="attention")
    alone = score(model, processor, records, null="attention", batch_size=1, batch_tokens=1)
    dropped = score(model, processor, records, null="drop")
    assert not scores.failures and scores.manifest["identity"]["null"] == {"name": "attention"}
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "dense", dense)
    for module in model.get_decoder().modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "dense"
    for record, own, single in zip(records, scores, alone, strict=True):
        example = encode_record(processor, to_record(record))
        batch = collate([example], 0)
        labels = batch.pop("labels")[0]  # [T]
        for hides in (False, True):
            HIDDEN.append((example.input_ids == model.config.image_token_id) & hides)
            with torch.no_grad():
                logits = model(**batch).logits[0]  # [T, V]
            losses = F.cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] != -100]
            np.testing.assert_allclose((own.null_loss if hides else own.loss), losses.mean().item(), atol=1e-4)
        np.testing.assert_allclose(own.token_vig, single.token_vig, atol=1e-4)
    assert max(np.abs(own.token_vig - without.token_vig).max() for own, without in zip(scores, dropped, strict=True)) > 1e-3


def test_a_model_that_sees_images_from_the_side_is_refused() -> None:
    model, processor = build("mllama")
    with pytest.raises(ValueError, match="null='attention' does not work with MllamaForConditionalGeneration.*take 'drop' or 'blur'"):
        score(model, processor, make_records(turns=1), null="attention")


def test_what_attention_does_not_go_with(tiny_model: Any, tiny_processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="hides all images.*only_image"):
        score(tiny_model, tiny_processor, [], null="attention", only_image=0)
    with pytest.raises(ValueError, match="unknown null image 'attention'"):
        VCD(null="attention")
    monkeypatch.setattr(tiny_model.config, "image_token_id", None)
    with pytest.raises(ValueError, match="MoFForConditionalGeneration names none"):
        score(tiny_model, tiny_processor, [], null="attention")
