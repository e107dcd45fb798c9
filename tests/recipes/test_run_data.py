"""Records are found, named, split and refused before anything is trained."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mof.data.records import RecordError, to_record
from study.run_data import read_run_data
from study.settings import Data


def record(name, image="a.png", **more):
    text = "<image>\nWhat?" if image else "What?"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "This."}]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {}) | more


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    for i in range(10):
        Image.new("RGB", (4, 4)).save(tmp_path / "first" / f"{i}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "second/a.png")
    return tmp_path


def read(folder, align, finetune=(), **options):
    (folder / "align.json").write_text(json.dumps(align))
    (folder / "finetune.json").write_text(json.dumps(list(finetune)))
    data = Data(align=["align.json"], finetune=["finetune.json"], image_folders=["first", "second"], **options)
    return read_run_data(data, folder)


def test_images_are_found_in_any_folder_and_in_any_form(folder):
    two = record("two", ["a.png", "3.png"])
    two["conversations"][0]["value"] = "<image><image>\nWhat?"
    chat = {"images": ["a.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "This."},
    ]}  # fmt: skip
    parts = [{"role": "user", "content": [{"type": "image", "image": "4.png"}, {"type": "text", "text": "What?"}]}, chat["messages"][1]]
    both = record("both", "a.png") | {"images": None, "messages": None}
    given = [record("first"), two, chat, parts, both, record("none", None) | {"image": None}, record("empty", "")]
    records = read(folder, given).align
    a, first = str(folder / "second/a.png"), folder / "first"
    assert [to_record(record).images for record in records] == [[a], [a, str(first / "3.png")], [a], [str(first / "4.png")], [a], [], []]
    assert len({record["id"] for record in records}) == 7  # also the records that came without a name have a name


def test_equal_ids_are_told_apart(folder):
    records = read(folder, [record("x"), record("x"), record("y")]).align
    assert [row["id"] for row in records] == ["x", "x#2", "y"]


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.3, 3), (0.4, 4), (0.7, 7), (0.9, 9)])
def test_held_out_photos_are_as_many_as_asked_for_and_in_neither_stage(folder, share, count):
    records = [record(str(i), f"{i}.png") for i in range(10)]
    if count == 1:
        with pytest.raises(ValueError, match=f"{share} of 10 "):
            read(folder, records, held_out=share)
        return
    data = read(folder, records, [*records, record("text", None)], held_out=share)
    assert len(data.held_out) == count
    assert len(data.align) == 10 - count
    assert {row["id"] for row in data.finetune} == {row["id"] for row in data.align} | {"text"}


def test_bad_records_are_named_all_at_once(folder):
    question = record("question")
    question["conversations"] = question["conversations"][:1]
    with pytest.raises(RecordError, match=r"4 of 5 records .*'lost'.*'no\.png'.*first.*question"):
        read(folder, [record("lost", "no.png"), record("fine"), question, record("more", "a.png", conversations=[]), 5])


def test_a_missing_file_is_an_os_error(folder):
    with pytest.raises(OSError, match="no.json"):
        read_run_data(Data(align=["no.json"]), Path(folder))
