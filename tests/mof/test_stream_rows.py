"""Records read as they are needed are the records that the whole file gives, and so are the errors."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mof.data import record_files
from mof.data.record_files import UnreadableRow, decoded
from mof.data.records import RecordError
from mof.data.rows import read_rows, stream_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
JSON = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_a_list_in_any_pieces(tmp_path: Path, monkeypatch, items, indent, ascii, piece) -> None:
    monkeypatch.setattr(record_files, "PIECE", piece)
    file = tmp_path / "x.json"
    file.write_text(json.dumps(items, indent=indent, ensure_ascii=ascii), encoding="utf-8-sig" if piece % 2 else "utf-8")
    assert list(stream_rows(file)) == read_rows(file) == items


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize(
    "content",
    [
        b"", b" \n", b"{}", b'{"id": 1}', b"3", b"[", b"[1", b"[1,", b"[1,]", b"[1 2]", b"[1][2]", b"[1] x", b"[1, {]", b'[{"a": 1}, {"a": "\xff"}]',
        b"[" * 100_000, b'[{"a": 1}}', b"]", b"[1, 2,, 3]", b"\xff",
    ],
)  # fmt: skip
def test_what_is_no_list_has_the_error_of_the_whole_file(tmp_path: Path, monkeypatch, content, piece) -> None:
    if len(content) > 1000 and piece < 1000:
        pytest.skip("slow")
    monkeypatch.setattr(record_files, "PIECE", piece)
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RecordError) as whole:
        read_rows(tmp_path / "x.json")
    with pytest.raises(RecordError) as streamed:
        list(stream_rows(tmp_path / "x.json"))
    assert str(streamed.value) == str(whole.value)


@pytest.mark.parametrize("content", ['{"id": 1}\n\n{"id": "\u2028"}\n', '{"id": 1}\n{"id"\n{"id": 2}', "[1]\n[2]", "x", "\n", ""])
def test_lines(tmp_path: Path, content) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    try:
        expected = read_rows(tmp_path / "x.jsonl")
    except RecordError as error:
        with pytest.raises(RecordError, match="x.jsonl"):
            list(stream_rows(tmp_path / "x.jsonl"))
        assert "x.jsonl" in str(error)
    else:
        assert list(stream_rows(tmp_path / "x.jsonl")) == expected


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),  # with halves of characters
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(VALUES, st.booleans())
def test_the_fast_parser_says_what_json_says(value: Any, ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(text.decode())
    except ValueError:
        with pytest.raises(ValueError):
            decoded(text)
    else:
        assert repr(decoded(text)) == repr(expected)  # NaN is not equal to itself


@settings(deadline=None)
@given(st.binary(max_size=12) | st.text('[]{}"0123456789.eE+-,: nulltrefasINy\\', max_size=12).map(str.encode))
def test_the_fast_parser_takes_nothing_that_json_refuses(text: bytes) -> None:
    try:
        expected = repr(json.loads(text.removeprefix(codecs.BOM_UTF8).decode()))
    except ValueError:
        with pytest.raises(ValueError):
            decoded(text)
    else:
        assert repr(decoded(text)) == expected


def test_items_whose_joints_stand_within_them_too(tmp_path: Path) -> None:
    """The end of an item is guessed by the text between two items, which may stand within the next."""
    inner = [{"id": 1}, {"id": 2}]
    items = [
        {"id": "a"},
        {"id": "b", "more": inner, "text": '}, {"id": 3'},
        {"id": "c", "more": inner},
        {"x": 1},
        {"id": "d"},
        5,
        {"id": "e"},
    ]
    (tmp_path / "x.json").write_text(json.dumps(items))
    assert list(stream_rows(tmp_path / "x.json")) == items


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("depth", [100, 201, 202, 500, 976, 100_000])
def test_a_record_whose_lists_lie_deep_costs_itself_wherever_it_is_read(tmp_path: Path, suffix: str, depth: int) -> None:
    """Python's own limit would depend on how many functions are at work, so that scoring could read what selecting could not."""
    good, deep = '{"id": "good", "text": "[[[\\"]"}', '{"id": "deep", "more": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"
    file = tmp_path / f"x.{suffix}"
    file.write_text("\n".join([good, deep, good]) if suffix == "jsonl" else f"[{good}, {deep}, {good}]")

    def read(frames: int) -> list[Any]:
        return list(stream_rows(file)) if not frames else read(frames - 1)

    first, middle, last = read(0)
    assert first == last == {"id": "good", "text": '[[["]'}
    assert (
        (middle["id"] == "deep") if depth <= 201 else (isinstance(middle, UnreadableRow) and "2" in middle.id and "deep" in middle.reason)
    )
    assert read(300) == [first, middle, last]
