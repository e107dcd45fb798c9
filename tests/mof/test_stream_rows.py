"""Records read as they are needed are the records that the whole file gives, and so are the errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mof.data import rows
from mof.data.records import RecordError
from mof.data.rows import read_rows, stream_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
JSON = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_a_list_in_any_pieces(tmp_path: Path, monkeypatch, items, indent, ascii, piece) -> None:
    monkeypatch.setattr(rows, "PIECE", piece)
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
    monkeypatch.setattr(rows, "PIECE", piece)
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
