"""The record reader: the forms that it accepts and refuses, and that its errors name the record."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import ExifTags, Image
from support.odd_records import ODD_RECORDS

from encoders import read_image
from mof.data.digests import digest, record_id
from mof.data.record_files import list_items
from mof.data.records import RecordError, images_of, texts_of, to_record
from mof.data.rows import read_records, read_rows


def image_part() -> dict[str, str]:
    return {"type": "image"}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat.png", "dog.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def llava(*values: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "r1", "conversations": turns, **more}


def test_llava_record(folder: Path) -> None:
    record = to_record(llava("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.", image="cat.png"), folder)
    assert record.id == "r1" and record.images == [str(folder / "cat.png")]
    assert record.messages == [
        {"role": "user", "content": [image_part(), text_part("What is it?")]},
        {"role": "assistant", "content": [text_part("A cat.")]},
        {"role": "user", "content": [text_part("Sure?")]},
        {"role": "assistant", "content": [text_part("Yes.")]},
    ]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("What?\n<image>", [image_part(), text_part("What?")]),
        ("Describe <image> it.", [image_part(), text_part("Describe  it.")]),  # two spaces, as LLaVA's loader leaves them
        ("<image>", [image_part()]),
        ("A <image> or <image>?", [text_part("A"), image_part(), text_part("or"), image_part(), text_part("?")]),
        (" kept \n", [text_part(" kept \n")]),
    ],
)
def test_placeholders_become_parts_and_a_single_image_comes_first(value: str, parts: list[dict[str, str]]) -> None:
    images = [Image.new("RGB", (4, 4))] * value.count("<image>")
    assert to_record(llava(value, "ok", image=images)).messages[0]["content"] == parts


def test_chat_messages(folder: Path) -> None:
    image = Image.new("RGB", (4, 4))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": image}, text_part("What?")]},
        {"role": "assistant", "content": [text_part("Nothing.")]},
    ]
    record = to_record({"id": 7, "messages": messages})
    assert record.id == "7" and record.images == [image]
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant"]
    beside = to_record({"messages": [{"role": "user", "content": "<image> What?"}], "images": ["dog.png"]}, folder)
    assert beside.images == [str(folder / "dog.png")]


MESSAGES = [
    {"role": "user", "content": [{"type": "image", "image": "cat.png"}, text_part("What is it?")]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": [{"type": "image", "path": "dog.png", "url": None}, text_part("Like  this?")]},
    {"role": "assistant", "content": [text_part("No.")]},
]
BESIDE = llava("<image>\nWhat is it?", "A cat.", "Like <image> this?", "No.", image=["cat.png", "dog.png"])
TABLE = {"conversations": None, "messages": None, "image": None, "images": None}


@pytest.mark.parametrize(
    "raw",
    [
        MESSAGES,
        {"messages": MESSAGES},
        {**TABLE, "messages": MESSAGES},
        {**{key: [] for key in TABLE}, "image": "", "messages": MESSAGES},
        {**TABLE, "conversations": MESSAGES},
        {**TABLE, **BESIDE, "messages": [], "images": []},
        {**TABLE, "conversations": [], "messages": BESIDE["conversations"], "image": "", "images": BESIDE["image"]},
        {"conversations": [{"from": "human", "value": MESSAGES[0]["content"]}, *MESSAGES[1:]]},
        {**BESIDE, "messages": [{"role": "user", "content": "another conversation"}]},
    ],
)
def test_a_conversation_is_the_same_in_every_form(raw: Any, folder: Path) -> None:
    """Rows of tables have all columns, filled or not; images lie beside the messages or inside."""
    record = to_record(raw, folder)
    assert record.messages == to_record(BESIDE, folder).messages
    assert record.images == [str(folder / name) for name in images_of(raw)] == [str(folder / "cat.png"), str(folder / "dog.png")]
    assert record.questions == texts_of(raw, "user") == ["What is it?", "Like  this?"]
    assert record.answers == texts_of(raw, "assistant") == ["A cat.", "No."]
    assert to_record(raw, folder).images == record.images  # what was given is as it was


@pytest.mark.parametrize("path", ["/etc/hostname", "../other/cat.png", "sub/../../other/cat.png"])
def test_images_stay_inside_their_folder(path: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir(exist_ok=True)
    (tmp_path / "other/cat.png").touch()
    with pytest.raises(RecordError, match="'r1'.*leads out of the image folder"):
        to_record(llava("<image>", "A cat.", image=path), folder)


def test_absolute_paths_are_taken_inside_the_folder_without_a_folder_and_under_the_root(folder: Path) -> None:
    raw = llava("<image>", "A cat.", image=str(folder / "cat.png"))
    assert [to_record(raw, place).images for place in (folder, None, "/")] == [[str(folder / "cat.png")]] * 3


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_the_bytes_of_a_file_in_any_type(kind: type) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    record = llava("<image>", "A cat.", image=kind(buffer.getvalue()))
    assert to_record(record).images[0].size == (3, 2)
    assert digest(record) == digest(llava("<image>", "A cat.", image=buffer.getvalue()))
    with pytest.raises(RecordError) as refused:
        to_record(llava("<image>", "A cat.", image=kind(b"secret")))
    assert "secret" not in str(refused.value)


def test_bytes_of_a_format_that_starts_a_program_are_refused() -> None:
    with pytest.raises(RecordError, match="'r1'.*EPS"):
        to_record(llava("<image>", "A cat.", image={"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "path": None}))


@pytest.mark.parametrize("absent", [{}, {"image": None}, {"image": ""}, {"images": []}])
def test_text_only(absent: dict[str, Any]) -> None:
    assert to_record(llava("Hi", "Ho", **absent)).images == []


def test_record_without_id_is_named_by_its_content() -> None:
    first, second = llava("Hi", "Ho"), llava("Hi", "Hum")
    del first["id"], second["id"]
    assert to_record(first).id == to_record(dict(first)).id != to_record(second).id
    for chosen in ({"token_mask": [True]}, {"token_weights": [0.5]}):
        assert to_record({**first, **chosen}).id == to_record(first).id  # trained as it was scored


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_id_is_no_id(empty: str | None) -> None:
    first, second = llava("Hi", "Ho") | {"id": empty}, llava("Hi", "Hum") | {"id": empty}
    assert to_record(first).id != to_record(second).id and len(to_record(second).id) == 16
    assert to_record(llava("Hi", "Ho") | {"id": 0}).id == "0"


def test_record_without_id_is_told_apart_by_its_pixels() -> None:
    red, blue = ({**llava("<image>", "A square."), "image": Image.new("RGB", (4, 4), colour)} for colour in ("red", "blue"))
    del red["id"], blue["id"]
    assert to_record(red).id != to_record(blue).id


def test_record_without_id_and_with_a_broken_open_image(folder: Path) -> None:
    noise = Image.effect_noise((64, 64), 100)
    noise.save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:600])
    raw = {"conversations": llava("<image>", "A cat.")["conversations"], "image": Image.open(folder / "cut.png")}
    assert to_record(raw).id  # the file is refused where its pixels are needed


def test_leading_answer_is_dropped_as_llava_does() -> None:
    raw = {"id": "x", "conversations": [{"from": "gpt", "value": "So?"}, *llava("Hi", "Ho")["conversations"]]}
    assert to_record(raw).messages == to_record(llava("Hi", "Ho")).messages


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (llava("<image>\nWhat?", "A cat."), "'r1'.*1 .*0 "),
        (llava("What?", "A cat.", image="cat.png"), "'r1'.*0 .*1 "),
        (llava("<image> <image>", "A cat.", image=["cat.png"]), "'r1'.*2 .*1 "),
        (llava("<image>", "A cat.", image="bird.png"), "'r1'.*bird.png.*image_folder="),
        (llava("What?", "A <image>"), "'r1'.*image.*gpt"),
        ({"id": "r1", "conversations": [{"from": "bot", "value": "x"}]}, "'r1'.*'bot'.*human, gpt"),
        ({"id": "r1", "conversations": [{"from": "human", "value": "x"}] * 2}, "'r1'.*user, user"),
        ({"id": "r1", "messages": [{"role": "system", "content": "x"}]}, "'r1'.*system"),
        ({"id": "r1", "conversations": [{"from": "gpt", "value": "x"}]}, "'r1'.*empty"),
        ({"id": "r1", "conversations": [{"from": "human", "value": None}]}, "'r1'.*human.*None"),
        ({"id": "r1", "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'r1'.*'video'"),
        ({"id": "r1", "conversations": ["hi"]}, "'r1'.*'hi'"),
        ({"id": "r1", "conversations": [None]}, "'r1'.*None"),
        ({"id": "r1", "conversations": [{"from": ["human"], "value": "x"}]}, r"'r1'.*\['human'\]"),
        ({"id": "r1", "messages": [{"role": "user", "content": ["hi"]}]}, "'r1'.*'hi'"),
        (llava("<image>", "A cat.", image=7), "'r1'.*7"),
        (llava("<image>", "A cat.", image=[None]), "'r1'.*None"),
        (llava("<image>", "A cat.", messages=None), "'r1'.*1 .*0 "),
        (llava("What?", "half a smiley: \ud83d"), "'r1'.*gpt"),
        (None, "'[0-9a-f]{16}'.*None"),
        ("hi", "'[0-9a-f]{16}'.*'hi'"),
        ([{"id": "r1"}], "'[0-9a-f]{16}'.*'r1'"),
        ({"id": "r1"}, "'r1'.*'conversations'.*'messages'.*None"),
    ],
)
def test_errors_name_the_record(raw: Any, message: str, folder: Path) -> None:
    with pytest.raises(RecordError, match=message):
        to_record(raw, folder)


@settings(max_examples=200, deadline=None)
@given(ODD_RECORDS)
def test_whatever_comes_is_a_record_or_an_error_that_names_it(raw: Any) -> None:
    images = images_of(raw)
    try:
        record = to_record(raw)
    except RecordError as error:
        assert repr(record_id(raw)) in str(error)
        return
    assert record.images == images == [] and record.questions == texts_of(raw, "user") and record.answers == texts_of(raw, "assistant")
    assert len(record.questions) - len(record.answers) in (0, 1) and record.id == record_id(raw)


def test_files(tmp_path: Path) -> None:
    records = [llava("Hi", "Ho"), llava("Grüße \u2028 you", "Ho")]
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "b.jsonl") == records
    (tmp_path / "c.jsonl").write_text("{}\n{oops\n")
    with pytest.raises(RecordError, match="c.jsonl, line 2"):
        read_records(tmp_path / "c.jsonl")
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(RecordError, match="d.json.*dict"):
        read_records(tmp_path / "d.json")


def test_a_bad_line_costs_one_row(tmp_path: Path) -> None:
    records = [llava("Grüße", "Ho"), llava("Hi", "Ha")]
    first, second = (json.dumps(record, ensure_ascii=False).encode() for record in records)
    file = tmp_path / "a.jsonl"
    bad = [b"{oops", second[:-9], b"\x1f\x8b\x08", "Grüße".encode("latin-1"), b"[" * 100_000, bytes(9)]
    file.write_bytes(b"\r\n".join([b"\xef\xbb\xbf" + first, *bad, b"", second]))  # with a byte order mark
    rows = read_rows(file)
    assert [rows[0], rows[-1]] == records
    assert [row.id for row in rows[1:-1]] == [f"a.jsonl, line {number}" for number in range(2, 8)]
    assert all(row.reason.startswith("not JSON") for row in rows[1:-1])
    with pytest.raises(RecordError, match="a.jsonl, line 2"):
        read_records(file)
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf[" + first + b"]")
    assert read_rows(tmp_path / "b.json") == read_records(tmp_path / "b.json") == records[:1]


@pytest.mark.parametrize("read", [read_rows, read_records])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "content",
    [gzip.compress(b"{}\n" * 9, mtime=0), b"id,image\n7,a.png\n", json.dumps([llava("Hi", "Ho")], indent=1).encode()[:-1], b"", b" \n"],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, read: Any, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=name):
        read(tmp_path / name)


@pytest.mark.data
def test_real_llava_records(shared_data: Path) -> None:
    raw = read_records(shared_data / "coco/llava_instruct.json")
    records = [to_record(row, shared_data / "coco/train2017") for row in raw]
    assert len(records) == 230 and sum(not record.images for record in records) == 5
    assert all("<image>" not in part.get("text", "") for r in records for m in r.messages for part in m["content"])


def test_the_digest_of_an_image_is_that_of_what_encoders_see() -> None:
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4

    def paletted(*colours: int, **info: int) -> Image.Image:
        image = Image.fromarray(indices, "P")
        image.putpalette(list(colours))
        image.info |= info
        return image

    red, negative = paletted(255, 0, 0, 0, 0, 0, 9, 9, 9, 0, 0, 99), paletted(0, 255, 255, 255, 255, 255, 246, 246, 246, 255, 255, 156)
    turned = Image.new("RGB", (4, 2), "red")
    turned.putpixel((0, 0), (0, 0, 0))
    plain, exif, file = turned.copy(), Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 3
    turned.save(file, "png", exif=exif)
    turned = Image.open(file)
    images = [red, negative, paletted(255, 0, 0, 0, 0, 0, 9, 9, 9, 0, 0, 99, transparency=0), plain, turned]
    digests = [digest({"image": image}) for image in images]
    assert len(set(digests)) == len(images)
    assert [digest({"image": read_image(image)}) for image in images] == digests
    assert digest({"image": plain}) == digest({"image": ["RGB", [4, 2], hashlib.sha256(plain.tobytes()).hexdigest()]}), (
        "as in earlier releases"
    )


def test_the_digest_of_an_array_sees_its_middle() -> None:
    array = np.zeros((40, 40, 3), np.uint8)
    other = array.copy()
    other[20, 20, 1] = 1
    assert str(array) == str(other) and len({digest(array), digest(other), digest(array.reshape(-1)), digest(array.view(np.int8))}) == 4


def test_the_digest_of_an_array_of_objects_is_that_of_what_they_hold() -> None:
    def turns(*texts: str) -> np.ndarray:
        return np.array([{"from": "gpt", "value": "".join(text)} for text in texts], dtype=object)

    assert digest(turns("A cat", "A dog")) == digest(turns("A cat", "A dog")) != digest(turns("A dog", "A cat"))


@pytest.mark.parametrize("text", ["[]", "[1, 2.5, null]", '[{"a": "]"}, [1]]', '[ {"a": 1}\n,\n{"b": "x, [y]"} ] \n', '["😀 \u2028", "z"]'])
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_a_list_is_read_in_pieces(text: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mof.data.record_files.PIECE", piece)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    if text == "[]":
        assert read_rows(tmp_path / "a.json") == []
    else:
        assert list(list_items(tmp_path / "a.json")) == json.loads(text)


@pytest.mark.parametrize("text", ["[1 2]", "[1,]", "[,1]", "[1,,2]", "[1] x", "[1", '["a', "[1}", "[nul]"])
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_a_damaged_list_is_refused(text: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mof.data.record_files.PIECE", piece)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RecordError, match=r"a\.json.*not JSON"):
        read_rows(tmp_path / "a.json")
