"""Data sets of Hugging Face, formatted and streamed, and Parquet files: scored, selected and trained like a list of the same records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import DataLoaderDispatcher
from support.commands import mof
from transformers import TrainingArguments

from encoders.storage import LOCKS
from mof.data import SupervisedCollator, read_records
from mof.data.records import require_unchanged, to_record
from vig import SelectiveTrainer, load_scores, score, select
from vig.cli.select import write_records

datasets = pytest.importorskip("datasets")


@pytest.fixture
def rows(records: list[dict[str, Any]], image_folder: Path) -> list[dict[str, Any]]:
    """The records in TRL's form: plain text, and a column of images."""
    roles = {"human": "user", "gpt": "assistant"}
    return [
        {
            "id": record["id"],
            "messages": [
                {"role": roles[turn["from"]], "content": turn["value"].removeprefix("<image>\n")} for turn in record["conversations"]
            ],
            "images": [{"bytes": (image_folder / record["image"]).read_bytes(), "path": None}],
        }
        for record in records
    ]


@pytest.fixture
def data_set(rows: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def assert_equal(scores: Any, expected: Any) -> None:
    assert not scores.failures and [s.id for s in scores] == [s.id for s in expected]
    for one, other in zip(scores, expected, strict=True):
        np.testing.assert_allclose(one.token_vig, other.token_vig, atol=1e-5)


@pytest.mark.parametrize("form", ["torch", "numpy", "streamed", "splits"])
def test_a_data_set_is_scored_as_the_list(form: str, llava, rows, records, image_folder, data_set) -> None:
    forms = {"streamed": data_set.to_iterable_dataset, "splits": lambda: datasets.DatasetDict({"train": data_set})}
    given = forms[form]() if form in forms else data_set.with_format(form)
    assert_equal(score(*llava, given), score(*llava, records, image_folder=image_folder))


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_rows_with_arrays_are_records(form: str, data_set, llava) -> None:
    """A Trainer takes rows out of a data set itself, and gives them to the collator as they are."""
    data_set = data_set.remove_columns("id").add_column("id", list(range(len(data_set))))
    for plain, formatted in zip(data_set, data_set.with_format(form), strict=True):
        expected, record = to_record(plain), to_record(formatted)
        assert (record.id, record.messages) == (expected.id, expected.messages) and isinstance(plain["id"], int)
        assert [image.tobytes() for image in record.images] == [image.convert("RGB").tobytes() for image in expected.images]
    batches = [SupervisedCollator(llava[1])([rows[i] for i in range(3)]) for rows in (data_set, data_set.with_format(form))]
    assert batches[0].keys() == batches[1].keys() and all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])


@pytest.mark.parametrize("form", [None, "torch"])
def test_a_selection_from_a_data_set_is_a_data_set(form: str | None, llava, data_set) -> None:
    selection = select(score(*llava, data_set), 0.6)
    expected, chosen = selection.apply(list(data_set)), selection.apply(data_set.with_format(form))
    assert isinstance(chosen, datasets.Dataset) and [row["id"] for row in chosen] == [record["id"] for record in expected]
    for row, record in zip(chosen, expected, strict=True):
        assert row["token_mask"] == record["token_mask"]
        require_unchanged(row)
    again = selection.apply(chosen)
    assert isinstance(again, datasets.Dataset) and again["token_mask"][:] == chosen["token_mask"][:]


def test_texts_and_repeated_ids_in_a_data_set(llava, rows) -> None:
    text = {"id": "text", "messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}], "images": []}
    repeated = [rows[0], {**rows[1], "id": rows[0]["id"]}, text, *rows[2:]]
    data_set = datasets.Dataset.from_list(repeated).cast_column("images", datasets.List(datasets.Image()))
    chosen = select(score(*llava, data_set), 1.0).apply(data_set)
    assert chosen["id"][:3] == [rows[0]["id"], f"{rows[0]['id']}#2", "text"] and len(chosen) == len(repeated)
    assert chosen[2]["token_mask"] is None and chosen[1]["token_mask"]
    for row in chosen:
        require_unchanged(row)


def test_equal_rows_without_ids(llava, rows) -> None:
    row = {key: value for key, value in rows[0].items() if key != "id"}
    data_set = datasets.Dataset.from_list([row, row])
    chosen = select(score(*llava, data_set), 1.0).apply(data_set)
    assert len(chosen) == 2 and "id" not in chosen.column_names and chosen[0]["token_mask"] == chosen[1]["token_mask"]
    for row in chosen:
        require_unchanged(row)


def test_a_stream_stays_a_stream_and_is_trained_on(llava, data_set, tmp_path) -> None:
    selection = select(score(*llava, data_set), 0.6)
    stream = selection.apply(data_set.to_iterable_dataset())
    assert isinstance(stream, datasets.IterableDataset)
    assert [row["id"] for row in stream] == selection.sample_ids
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=2, per_device_train_batch_size=2, save_strategy="no")
    trainer = SelectiveTrainer(llava[0], arguments, train_dataset=stream, processing_class=llava[1])
    assert not isinstance(trainer.get_train_dataloader(), DataLoaderDispatcher)  # each of several processes reads its own records
    state = {name: value.clone() for name, value in llava[0].state_dict().items()}
    try:
        assert np.isfinite(trainer.train().training_loss)
    finally:
        llava[0].load_state_dict(state)


def test_parquet_files(llava, rows, records, image_folder, tmp_path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "records.parquet")
    assert read_records(tmp_path / "records.parquet") == rows
    expected = score(*llava, records, image_folder=image_folder)
    scores = score(*llava, tmp_path / "records.parquet", output_dir=tmp_path / "scores")
    assert_equal(scores, expected)
    given = ["--scores", tmp_path / "scores", "--records", tmp_path / "records.parquet", "--keep", "0.6"]
    result = mof("vig", "select", *given, "--output", tmp_path / "selected.parquet")
    assert result.exit_code == 0, result.output
    chosen = read_records(tmp_path / "selected.parquet")
    assert [record["id"] for record in chosen] == select(scores, 0.6).sample_ids
    for record in chosen:
        require_unchanged(record)


def test_pandas_reads_a_folder_of_scores(llava, records, image_folder, tmp_path) -> None:
    """While a run is alive, and when it is done. The names of an earlier release are still read."""
    pandas = pytest.importorskip("pandas")
    scores = score(*llava, records, image_folder=image_folder, output_dir=tmp_path / "scores")
    assert pandas.read_parquet(tmp_path / "scores")["id"].sort_values().tolist() == sorted(scores.ids)
    assert list((tmp_path / "scores").glob(LOCKS)) or (tmp_path / "scores/_lock-0000").write_bytes(b"") == 0
    assert len(pandas.read_parquet(tmp_path / "scores")) == len(scores)
    for path in (tmp_path / "scores").glob("_*"):
        path.rename(path.with_name(path.name[1:]))
    manifest = json.loads((tmp_path / "scores/manifest.json").read_text())
    manifest["files"] = {name.removeprefix("_"): digest for name, digest in manifest["files"].items()}
    del manifest["digest"]
    (tmp_path / "scores/manifest.json").write_text(json.dumps(manifest))
    assert sorted(load_scores(tmp_path / "scores").ids) == sorted(scores.ids)
    again = score(*llava, records, image_folder=image_folder, output_dir=tmp_path / "scores")
    assert again.ids == scores.ids and not (tmp_path / "scores/_manifest.json").exists()


def test_records_that_a_file_cannot_hold(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.json cannot hold bytes.*\.parquet"):
        write_records(tmp_path / "a.json", rows)
    with pytest.raises(ValueError, match=r"a\.parquet.*same entries.*\.jsonl"):
        write_records(tmp_path / "a.parquet", [rows[0], {**rows[1], "source": "x"}])
    for odd in ({"id": 7, "image": "1.png"}, {"id": "b", "image": ["1.png", "2.png"]}):
        with pytest.raises(ValueError, match=r"a\.parquet.*same types.*\.jsonl"):
            write_records(tmp_path / "a.parquet", [{"id": "a", "image": "1.png"}, odd])
    assert not list(tmp_path.iterdir())
