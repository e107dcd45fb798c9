"""Identity, versions and locks of runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders.runs import RunFile, RunLock, differences, versions

SCALARS = st.none() | st.integers() | st.text(max_size=3)
IDENTITIES = st.dictionaries(st.text(max_size=3), SCALARS | st.dictionaries(st.text(max_size=3), SCALARS, max_size=3), max_size=4)


def run_file(folder: Path, format: int = 1) -> RunFile:
    return RunFile(folder / "run.json", "test run", format, "give a new folder")


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
