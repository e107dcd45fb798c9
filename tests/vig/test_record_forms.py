"""The same conversations in every form that records come in give the same scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encoders.images.reading import read_image
from mof.data.digests import record_id
from mof.data.rows import read_records
from vig import SelectiveTrainer, record_sources, score, select
from vig.scoring.pairs import RememberedImages


def as_messages(record: dict[str, Any], folder: Path, image: str) -> list[dict[str, Any]]:
    """Chat messages with the image inside: "path", "pil", "bytes", or "column" for none, and one {"bytes", "path"} per row."""
    file = folder / record["image"]
    source = {"path": str(file), "pil": Image.open(file), "bytes": {"bytes": file.read_bytes(), "path": None}}.get(image)
    messages = []
    for turn in record["conversations"]:
        text = turn["value"].removeprefix("<image>\n")
        # a table has all keys in all rows
        part = {"type": "text", "text": text, "image": None}
        first = [{"type": "image", "text": None, "image": source}] if text != turn["value"] else []
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": [*first, part]})
    return messages


def assert_same(scores: Any, expected: Any) -> None:
    assert len(scores) == len(expected) and not scores.failures
    for a, b in zip(scores, expected, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        np.testing.assert_allclose(a.token_vig, b.token_vig, atol=1e-5)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_files(llava, records, image_folder, tmp_path, suffix) -> None:
    text = json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records))
    (tmp_path / f"records.{suffix}").write_text(text)
    expected = score(*llava, records, image_folder=image_folder)
    assert_same(score(*llava, read_records(tmp_path / f"records.{suffix}"), image_folder=image_folder), expected)


@pytest.mark.parametrize("image", ["path", "pil", "bytes"])
def test_lists_of_messages(llava, records, image_folder, image) -> None:
    expected = score(*llava, records, image_folder=image_folder)
    conversations = [as_messages(record, image_folder, image) for record in records]
    scores = score(*llava, conversations)
    assert_same(scores, expected)
    assert_same(score(*llava, iter(conversations)), expected)
    assert scores.ids == [record_id(messages) for messages in conversations]
    assert_same(score(*llava, [{"id": str(i), "messages": messages} for i, messages in enumerate(conversations)]), expected)
    chosen = select(scores, 0.6).apply(conversations)
    assert [set(record) for record in chosen] == [{"id", "messages", "token_mask", "scored_digest"}] * 3


def test_messages_are_trained_on_as_they_were_scored(llava, records, image_folder, tmp_path) -> None:
    from transformers import TrainingArguments

    conversations = [as_messages(record, image_folder, "path") for record in records]
    chosen = select(score(*llava, conversations), 0.6).apply(conversations)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = SelectiveTrainer(llava[0], arguments, processing_class=llava[1])
    labels = trainer.data_collator(chosen)["labels"]
    assert (labels != -100).sum() == sum(sum(record["token_mask"]) for record in chosen)


def test_data_set_of_the_datasets_library(llava, records, image_folder, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"id": r["id"], "source": "a", "messages": as_messages(r, image_folder, "column"), "images": [str(image_folder / r["image"])]}
        for r in records
    ]
    for row in rows:
        for message in row["messages"]:
            message["content"] = [{"type": part["type"], "text": part["text"]} for part in message["content"]]
    (tmp_path / "cut.png").write_bytes((image_folder / records[0]["image"]).read_bytes()[:60])
    rows.insert(2, {**rows[0], "id": "cut", "images": [str(tmp_path / "cut.png")]})
    data = datasets.Dataset.from_list(rows)
    expected = score(*llava, records, image_folder=image_folder)
    for decode, name in ((True, "row 2"), (False, "cut")):
        images = data.cast_column("images", datasets.Sequence(datasets.Image(decode=decode)))
        scores = score(*llava, images)
        assert scores.ids == [r["id"] for r in records] and list(scores.failures) == [name]
        scores.manifest["failures"] = {}
        assert_same(scores, expected)
        assert len(select(scores, 0.6, sources=record_sources(images)).apply(images)) == 3


def test_an_image_is_prepared_once_for_records_in_a_row(llava, records, image_folder, monkeypatch) -> None:
    """Once for the image and once for its blurred copy, whether records name the file or hold images with equal pixels."""
    processor, seen = llava[1], []
    kind = type(processor.image_processor)
    own = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, images, **options: seen.append(images) or own(self, images, **options))
    files = [{**record, "id": f"{record['id']}-{i}"} for record in records for i in range(3)]
    expected = {s.id: s.token_vig for s in score(llava[0], processor, records, image_folder=image_folder)}
    assert len(seen) == 2 * len(records)
    opened = [{**record, "image": read_image(image_folder / record["image"]).copy()} for record in files]
    for given in (files, opened):
        seen.clear()
        scores = score(llava[0], processor, given, image_folder=image_folder)
        assert len(seen) == 2 * len(records) and len(scores) == 3 * len(records)
        for s in scores:
            np.testing.assert_allclose(s.token_vig, expected[s.id.split("-")[0]], atol=1e-5)


def test_remembered_images_are_those_of_the_processor(llava) -> None:
    remembering = RememberedImages(llava[1].image_processor)
    first, second = (Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)) for seed in (0, 1))
    for images in ([first], [first], [second], [first, second], [[first, second]], [first.copy()]):
        expected = llava[1].image_processor(images, return_tensors="pt")
        got = remembering(images, return_tensors="pt")
        assert got.keys() == expected.keys() and (got["pixel_values"] == expected["pixel_values"]).all()
        got.pop("pixel_values")  # as processors do; the next call gives it again
    assert remembering.size == llava[1].image_processor.size
