"""The kit for folders that commands fill: whole files, whose run it is, one run at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders.command_groups import starts_over
from encoders.runs import RunFile, RunLock, differences, versions
from encoders.whole_files import local_path, remove_unfinished, write_json, write_whole

SCALARS = st.none() | st.integers() | st.text(max_size=3)
IDENTITIES = st.dictionaries(st.text(max_size=3), SCALARS | st.dictionaries(st.text(max_size=3), SCALARS, max_size=3), max_size=4)


def run_file(folder: Path, format: int = 1) -> RunFile:
    return RunFile(folder / "run.json", "test run", format, "give a new folder")


def test_a_writer_that_fails_changes_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def fail(path: Path) -> None:
        assert path.suffix == ".json"
        path.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_whole(tmp_path / "a.json", fail)
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("url", ["s3://bucket/out", "gs://bucket", "hf://datasets/x", "s3:/bucket/out", Path("s3://bucket/out")])
def test_a_url_is_no_output(url: str | Path) -> None:
    with pytest.raises(ValueError, match=f"{url} is a URL, but this command writes to file systems only.*sync FOLDER URL"):
        local_path(url)
    with pytest.raises(ValueError, match="is a URL"):
        RunFile(Path(url) / "run.json", "test run", 1, "give a new folder")


def test_other_names_are_outputs(tmp_path: Path) -> None:
    for path in (tmp_path, "runs/a:b", "C:/runs", "./s3:/x", "a"):
        assert local_path(path) == Path(path)


@given(IDENTITIES, IDENTITIES)
def test_differences_are_none_for_equals_only(old: dict, new: dict) -> None:
    def absent_as_null(value: object) -> object:  # an entry that is null and one that is missing are the same
        return {key: absent_as_null(part) for key, part in value.items() if part is not None} if isinstance(value, dict) else value

    assert not list(differences(old, old))
    if absent_as_null(old) != absent_as_null(new):
        assert list(differences(old, new)) == [line for line in differences(old, new) if line]


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    identity = {"model": "a", "versions": {"torch": "1"}}
    run_file(tmp_path).claim(identity)
    assert run_file(tmp_path).claim(identity)["identity"] == identity
    with pytest.raises(ValueError, match=r"versions.torch: '1' there, '2' now"):
        run_file(tmp_path).claim({"model": "a", "versions": {"torch": "2"}})
    run_file(tmp_path).claim({"model": "b"}, begun=False)
    assert run_file(tmp_path).read()["identity"] == {"model": "b"}


def test_what_is_no_runs_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex"):
        run_file(tmp_path).claim({})
    RunFile(tmp_path / "run.json", "test run", 1, "give another folder", own=["*.tex"]).claim({})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', "\x00\x01"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        run_file(tmp_path).read()


def test_another_format_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.json"):
        run_file(tmp_path).read()
    run_file(tmp_path, format=2).claim({})
    with pytest.raises(ValueError, match="format 2"):
        run_file(tmp_path, format=1).read()


def test_versions_of_what_is_installed_and_not() -> None:
    assert versions("pytest", "no-such-package") == {"pytest": pytest.__version__, "no-such-package": "source"}


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from encoders.runs import RunLock; lock = RunLock(Path({str(tmp_path)!r}), 1); lock.take(); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=str(tmp_path)):
            RunLock(tmp_path).take()
        holder.kill()
        holder.wait()
    unfinished = tmp_path / ".tmp-x-run.json"
    unfinished.write_text("{")
    (tmp_path / ".tmp-x-1-00-conversion").mkdir()  # of another command, which may be alive
    with RunLock(tmp_path):
        assert not unfinished.exists()


def test_unfinished_files_of_killed_processes_go(tmp_path: Path) -> None:
    """A command that writes a single file deletes them before it begins, but not the file that a living process is writing."""
    output, other = tmp_path / "selected[1].json", tmp_path / ".tmp-1234abcd-other.json"
    other.write_text("of another file")
    there = {
        tmp_path / f".tmp-{start}-selected[1].{end}"
        for start in ("0123456789abcdef", "0123abcd-7-89abcdef")
        for end in ("card.json", "json")
    }
    for path in there:
        path.write_text("of an earlier release, or of another machine, where its process may live")
    code = f"from pathlib import Path; from encoders.whole_files import write_whole; write_whole(Path({str(output)!r}), lambda path: (path.write_text('['), print(path, flush=True), input()))"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        unfinished = Path(writer.stdout.readline().removesuffix("\n"))
        write = starts_over(lambda output: write_json(output, []))
        write(output=output)
        assert set(tmp_path.iterdir()) == {output, other, unfinished, *there}
        writer.kill()
        writer.wait()
    for path in there:
        os.utime(path, (0, time.time() - 2 * 24 * 3600))
    write(output=output)
    assert set(tmp_path.iterdir()) == {output, other}


def test_a_leftover_that_may_not_be_deleted_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder such as /tmp, nobody may delete the files of others."""
    leftover = tmp_path / ".tmp-0123abcd-7-89abcdef-a.json"
    leftover.write_text("another user's")
    os.utime(leftover, (0, 0))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    starts_over(lambda output: write_json(output, []))(output=tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "[]" and leftover.exists()
