"""The VIG of each encoder: against plain forward passes with features replaced by hand, and each image encoded once."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.commands import mof
from support.same_scores import assert_same
from torch.nn import functional as F

from encoders.images.reading import blur, read_image
from encoders.pages import signed
from mof import AdditiveMoF, ConcatMoF, GatedMoF, InterleavedMoF, MoFForConditionalGeneration, MoFProcessor, SequenceMoF
from mof.data.collator import SupervisedCollator
from vig import load_scores, score, select


def losses_by_hand(model: Any, batch: Any, features: dict[str, torch.Tensor]) -> np.ndarray:
    """[A] the losses of the answer tokens of a record, when the image's tokens are fused from these features."""
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(ids).clone()  # [1, L, D]
    embeds[ids == model.config.image_token_id] = model.mixer.fuse(features).flatten(0, 1)
    logits = model.language_model(inputs_embeds=embeds).logits  # [1, L, V]
    losses = F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="none", ignore_index=-100)
    return losses[batch["labels"][0, 1:] != -100].numpy()


def images_of(record: dict[str, Any], folder: Path) -> list[Any]:
    names = record["image"] if isinstance(record["image"], list) else [record["image"]]
    return [read_image(folder / name) for name in names]


@torch.no_grad()
@pytest.mark.parametrize("fusion", [None, SequenceMoF, ConcatMoF, GatedMoF, "three encoders on tiles"])
def test_only_this_encoder_sees_the_null_image(
    tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, records: list[Any], image_folder: Path, fusion: Any
) -> None:
    model = copy.deepcopy(tiny_model)
    if isinstance(fusion, str):
        encoders = {**dict(model.mixer.encoders.items()), "a again": model.mixer.encoders["a"]}
        model.mixer = InterleavedMoF(encoders, 32, pool=2, unshuffle=True).eval()
        tiny_processor = MoFProcessor.from_parts(model, tiny_processor.tokenizer, max_tiles=4)
    elif fusion is not None:
        torch.manual_seed(0)
        model.mixer = fusion(dict(model.mixer.encoders.items()), 32).eval()
        tiny_processor = MoFProcessor.from_parts(model, tiny_processor.tokenizer)
    scores = score(model, tiny_processor, records, image_folder=image_folder, per_encoder=True)
    assert scores.ids == [record["id"] for record in records] and scores.encoders == list(model.mixer.encoders)
    collator = SupervisedCollator(tiny_processor, 2048, image_folder)
    apart = 0.0
    for record, measured in zip(records, scores, strict=True):
        images = images_of(record, image_folder)
        shown, blurred = (
            model.mixer.encode(tiny_processor.image_processor(pictures, return_tensors="pt")["pixel_values"])
            for pictures in (images, [blur(image) for image in images])
        )
        batch = collator([record])
        clean = losses_by_hand(model, batch, shown)
        np.testing.assert_allclose(measured.loss, clean.mean(), atol=1e-5)
        np.testing.assert_allclose(measured.token_vig, losses_by_hand(model, batch, blurred) - clean, atol=2e-5)
        for name in scores.encoders:
            replaced = losses_by_hand(model, batch, {**shown, name: blurred[name]})
            np.testing.assert_allclose(measured.encoder_vig[name], replaced - clean, atol=2e-5)
            assert measured.encoder_vig[name].dtype == np.float32
            apart = max(apart, float(np.abs(measured.encoder_vig[name] - measured.token_vig).max()))
    assert apart > 1e-3


def test_an_encoder_that_the_model_does_not_read_tells_nothing(
    tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, records: list[Any], image_folder: Path
) -> None:
    encoders = dict(tiny_model.mixer.encoders.items())
    encoders["b"] = copy.deepcopy(encoders["a"])
    tiny_model.mixer = AdditiveMoF(encoders, 32, weights={"a": 1.0, "b": 0.0}).eval()
    processor = MoFProcessor.from_parts(tiny_model, tiny_processor.tokenizer)
    for measured in score(tiny_model, processor, records, image_folder=image_folder, per_encoder=True):
        assert not measured.encoder_vig["b"].any()
        np.testing.assert_array_equal(measured.encoder_vig["a"], measured.token_vig)
        assert measured.token_vig.any()


def test_each_image_is_encoded_once(
    tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, records: list[Any], image_folder: Path
) -> None:
    seen: Counter[str] = Counter()
    for name, encoder in tiny_model.mixer.encoders.items():
        own = encoder.patch_tokens

        def counted(x: torch.Tensor, name: str = name, own: Any = own) -> torch.Tensor:
            seen[name] += len(x)
            return own(x)

        encoder.patch_tokens = counted
    again = [{**record, "id": f"{record['id']}-{n}"} for record in records for n in range(3)]
    score(tiny_model, tiny_processor, again, image_folder=image_folder, per_encoder=True)
    shown = {str(record["image"]): len(images_of(record, image_folder)) for record in records}
    assert seen == {"a": 2 * sum(shown.values()), "b": 2 * sum(shown.values())}


def test_folder(
    tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, records: list[Any], image_folder: Path, tmp_path: Path
) -> None:
    parts, options = (tiny_model, tiny_processor, records), {"image_folder": image_folder}
    plain = score(*parts, tmp_path / "plain", **options)
    split = score(*parts, tmp_path / "split", per_encoder=True, measures=("loss",), calibrate=True, **options)
    assert_same(plain, split, atol=1e-5)
    assert load_scores(tmp_path / "plain").encoders == [] and not load_scores(tmp_path / "plain")[0].encoder_vig
    loaded = load_scores(tmp_path / "split")
    for ours, theirs in zip(sorted(loaded, key=lambda s: s.id), sorted(split, key=lambda s: s.id), strict=True):
        assert list(ours.encoder_vig) == ["a", "b"]
        for name, values in ours.encoder_vig.items():
            np.testing.assert_array_equal(values, theirs.encoder_vig[name])
    np.testing.assert_array_equal(loaded.column("token_vig_of_b"), np.concatenate([s.encoder_vig["b"] for s in loaded]))
    shard = pq.read_table(next((tmp_path / "split").glob("shard-*.parquet")))
    assert {"token_vig_of_a", "token_vig_of_b"} < set(shard.column_names)
    loaded.save(tmp_path / "copy")
    np.testing.assert_array_equal(load_scores(tmp_path / "copy").column("token_vig_of_a"), loaded.column("token_vig_of_a"))
    assert select(loaded, keep=0.5).sample_ids == select(load_scores(tmp_path / "plain"), keep=0.5).sample_ids
    with pytest.raises(ValueError, match="per_encoder=True"):
        plain.column("token_vig_of_a")
    with pytest.raises(ValueError, match="a, b"):
        loaded.column("token_vig_of_c")
    with pytest.raises(ValueError, match="encoders"):  # another run
        score(*parts, tmp_path / "plain", per_encoder=True, **options)


@pytest.mark.slow
def test_the_commands_write_a_page_that_colours_tokens_by_encoder(
    records: list[Any], image_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "records.json").write_text(json.dumps(records))
    inputs = ["--records", tmp_path / "records.json", "--images", image_folder, "--output"]
    commands = (
        ["score", "--model", tmp_path / "model", *inputs, tmp_path / "scores", "--per-encoder", "--no-calibrate"],
        ["report", tmp_path / "scores", *inputs, tmp_path / "x.html"],
    )
    for command in commands:
        result = mof("vig", *command)
        assert result.exit_code == 0, result.output
    page, scores = (tmp_path / "x.html").read_text(), load_scores(tmp_path / "scores")
    assert page.count("a alone:") == page.count("b alone:") > 0
    mean = float(scores.column("token_vig_of_a").mean())
    assert f"<td>a</td><td>{signed(mean)}" in page
    value = float(scores[0].encoder_vig["b"][0])
    assert f'title="{signed(value)} nats' in page


def test_what_has_no_encoders_is_refused(
    llava: Any, tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, records: list[Any], image_folder: Path
) -> None:
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration"):
        score(*llava, records, image_folder=image_folder, per_encoder=True)
    for null in ("drop", "attention"):
        with pytest.raises(ValueError, match=null):
            score(tiny_model, tiny_processor, records, null=null, image_folder=image_folder, per_encoder=True)
