"""Forms in which records come from elsewhere: each gives the record that LLaVA's form gives."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from mof.data.collator import SupervisedCollator
from mof.data.digests import digest, record_id
from mof.data.record_files import UnreadableRow
from mof.data.records import RecordError, images_of, texts_of, to_record
from mof.data.rows import id_of, rows
from mof.processor import MoFProcessor

FILE = io.BytesIO()
Image.new("RGB", (4, 4), "red").save(FILE, "PNG")
PNG, BASE64 = FILE.getvalue(), base64.b64encode(FILE.getvalue()).decode()
URL = f"data:image/png;base64,{BASE64}"
TURNS = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]


def chat(*parts: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [*parts, {"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}], **more}


FORMS: dict[str, Any] = {
    "data address": {"image": URL, "conversations": TURNS},
    "bytes": {"image": PNG, "conversations": TURNS},
    "file address": {"image": "file://{folder}/a.png", "conversations": TURNS},
    "path object": {"image": Path("a.png"), "conversations": TURNS},
    "OpenAI's part": chat({"type": "image_url", "image_url": {"url": URL}}),
    "OpenAI's later part": chat({"type": "input_image", "image_url": URL}),
    "base64 in the part": chat({"type": "image", "base64": BASE64}),
    "Anthropic's part": chat({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}}),
    "no images beside the part": chat({"type": "image", "image": "a.png"}, images=[]),
    "part of a table": chat({"type": None, "image": "a.png", "text": None}),
    "text of a table": {"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": None, "text": "q"}]}, {"role": "assistant", "content": "a"}]},
    "capitals": chat({"type": "image", "image": "a.png"}, role="User"),
    "ShareGPT": {"image": "a.png", "conversations": [TURNS[0], {"from": "chatgpt", "value": "a"}]},
    "singular": {"image": "a.png", "conversation": TURNS},
    "JSON text": {"image": "a.png", "conversations": json.dumps(TURNS)},
    "turns alone": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    "TRL": {"images": ["a.png"], "prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    "TRL, plain": {"images": ["a.png"], "prompt": "q", "completion": "a"},
    "query and response": {"images": ["a.png"], "query": "<image>q", "response": "a"},
    "plain content and images": {"images": ["a.png"], "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "plain question, answer in parts": {"images": ["a.png"], "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    "image at the end": {"image": "a.png", "conversations": [{"from": "human", "value": "q\n<image>"}, TURNS[1]]},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_form_from_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    raw = FORMS[name]
    if isinstance(raw, dict) and isinstance(raw.get("image"), str):
        raw = {**raw, "image": raw["image"].format(folder=tmp_path)}
    record = to_record(raw, tmp_path)
    images = 0 if name == "turns alone" else 1
    assert len(record.images) == len(images_of(raw)) == images
    assert [part.get("text") for part in record.messages[0]["content"]] == [*([None] * images), "q"]
    assert [message["role"] for message in record.messages] == ["user", "assistant"]
    assert (record.questions, record.answers) == (texts_of(raw, "user"), texts_of(raw, "assistant")) == (["q"], ["a"])


LARGE = io.BytesIO()
Image.effect_noise((16, 16), 50).save(LARGE, "JPEG")  # its base64 begins with a slash, like an absolute path
BARE = base64.b64encode(LARGE.getvalue()).decode()
TOLD: dict[str, tuple[Any, str]] = {
    "base64": ({"image": BARE, "conversations": TURNS}, "looks like base64.*data:image"),
    "base64, in lines": ({"image": base64.encodebytes(LARGE.getvalue()).decode(), "conversations": TURNS}, "looks like base64"),
    "address": ({"image": "https://example.org/a.png", "conversations": TURNS}, "https://example.org/a.png.*download"),
    "damaged data address": ({"image": "data:image/png;base64,#", "conversations": TURNS}, "not base64"),
    "address in a part": (chat({"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}), "download"),
    "result of a tool": ({"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "5"}]}, "tools.*'tool'"),
    "function of ShareGPT": ({"conversations": [TURNS[0], {"from": "function_call", "value": "f"}]}, "tools.*'function_call'"),
    "call of a tool": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [{"function": {}}]}]},
        "tools",
    ),
    "call of a function": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
        "tools",
    ),
    "result in ms-swift": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "tool_response", "content": "5"}]},
        "tools.*'tool_resp",
    ),
}


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("name", TOLD)
def test_what_is_not_read_is_named_with_advice(name: str, folder: bool, tmp_path: Path) -> None:
    raw, words = TOLD[name]
    with pytest.raises(RecordError, match=f"(?s)'r'.*{words}") as caught:
        to_record({"id": "r", **raw}, tmp_path if folder else None)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "raw", [{"image": "x" * 10**6, "conversations": TURNS}, {"image": "a.png", "conversations": "y" * 10**6}, chat({"type": "z" * 10**6})]
)
def test_messages_stay_short(raw: Any) -> None:
    with pytest.raises(RecordError) as caught:
        to_record({"id": "r", **raw})
    assert "'r'" in str(caught.value) and len(str(caught.value)) < 1000


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [300, 976])
def test_a_record_that_is_nested_deep_costs_itself(depth: int) -> None:
    aside = {"image": PNG, "conversations": TURNS, "meta": nested(depth)}
    inside = {"id": "r", "image": PNG, "conversations": [{"from": "human", "value": nested(depth)}, TURNS[1]]}
    assert len(to_record(aside).images) == 1 and record_id(aside) != record_id({**aside, "image": PNG + b"x"})
    with pytest.raises(RecordError, match="'r'"):
        to_record(inside)
    assert len(digest(inside)) == 16


def test_records_of_equal_ids_are_numbered() -> None:
    """LLaVA's own files use the id of the image for several records. The order decides, so every reader gives the same ids."""
    same = [{"id": "7", "conversations": TURNS}, {"id": "7", "conversations": TURNS[:1]}, {"id": "7#2", "conversations": []}, {"id": 7}]
    assert [id_of(row) for row in rows(same)] == ["7", "7#2", "7#2#2", "7#3"]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    first, second = rows([messages, messages])
    assert first == messages and second["messages"] == messages and second["id"] == f"{record_id(messages)}#2"


def test_what_holds_records(tmp_path: Path) -> None:
    records = [{"id": str(i), "image": "a.png", "conversations": TURNS} for i in range(3)]
    (tmp_path / "r.json").write_text(json.dumps(records))
    assert list(rows(tmp_path / "r.json")) == list(rows(str(tmp_path / "r.json"))) == list(rows(iter(records))) == records
    assert list(rows(pa.Table.from_pylist(records))) == list(rows({"train": [*records]})) == records
    for wrong in ({"train": records, "test": records}, {record["id"]: record for record in records}, records[0]):
        with pytest.raises(RecordError, match="dict"):
            list(rows(wrong))


def test_a_data_frame_and_a_dict_of_splits() -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    records = [{"id": "0", "image": "a.png", "conversations": TURNS}, {"id": "1", "image": None, "conversations": TURNS}]
    assert list(rows(pandas.DataFrame(records))) == records
    image = Image.new("RGB", (4, 4))
    opened = [{"id": "0", "image": image, "conversations": TURNS}, {"id": "1", "image": None, "conversations": TURNS}]
    assert [images_of(row) for row in rows(pandas.DataFrame(opened))] == [[image], []]
    assert list(rows(datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}))) == records


@pytest.mark.parametrize("mask", ["yes", [None], [["a"]], 3, {"a": 1}, [True] * 9, [[True] * 4], [float("nan")] * 4, [-1.0] * 4])
@pytest.mark.parametrize("key", ["token_mask", "token_weights"])
def test_a_mask_of_a_wrong_type_costs_its_record(
    key: str, mask: Any, tiny_processor: MoFProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"id": "good", "image": PNG, "conversations": TURNS}, {"id": "odd", "image": PNG, "conversations": TURNS, key: mask}]
    batch = SupervisedCollator(tiny_processor)(records)
    assert len(batch["labels"]) == 1 and "'odd'" in caplog.text
    with pytest.raises(RecordError, match="'odd'"):
        SupervisedCollator(tiny_processor, strict=True)(records)


def test_the_collator_takes_lists_of_messages(tiny_processor: MoFProcessor) -> None:
    messages = chat({"type": "image", "image": PNG})["messages"]
    batch, expected = (SupervisedCollator(tiny_processor)([raw]) for raw in (messages, {"messages": messages}))
    assert batch["labels"].tolist() == expected["labels"].tolist() and (batch["labels"] != -100).any()


def test_an_unreadable_row_keeps_its_reason() -> None:
    assert list(rows([UnreadableRow("row 3", "torn")])) == [UnreadableRow("row 3", "torn")]
