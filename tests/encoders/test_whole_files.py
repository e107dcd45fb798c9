"""A folder or a file is replaced as a whole, whatever stops the process."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from encoders import whole_files
from encoders.command_groups import starts_over
from encoders.runs import RunFile
from encoders.whole_files import local_path, remove_unfinished, write_json, write_whole


def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path / "old", tmp_path / "new"


@pytest.mark.parametrize("exchanges", [True, False])
def test_replaced(tmp_path, monkeypatch, exchanges) -> None:
    if not exchanges:
        monkeypatch.setattr(whole_files, "_exchange", lambda *_: False)
    folder, new = folders(tmp_path)
    whole_files.replace_folder(folder, new)
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (folder / "file").read_text() == "new"
    _, new = tmp_path, tmp_path / "first"
    new.mkdir()
    whole_files.replace_folder(tmp_path / "fresh", new)  # where no folder is
    assert (tmp_path / "fresh").is_dir()


def test_stopped_while_the_old_folder_is_deleted(tmp_path, monkeypatch) -> None:
    folder, new = folders(tmp_path)
    monkeypatch.setattr(whole_files.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        whole_files.replace_folder(folder, new)
    assert (folder / "file").read_text() == "new"


def test_stopped_between_the_two_names(tmp_path, monkeypatch) -> None:
    """Where the system cannot exchange names, the old folder comes back."""
    folder, new = folders(tmp_path)
    rename = Path.rename
    monkeypatch.setattr(whole_files, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", lambda path, to: rename(path, to) if path != new else (_ for _ in ()).throw(OSError("stopped")))
    with pytest.raises(OSError, match="stopped"):
        whole_files.replace_folder(folder, new)
    assert (folder / "file").read_text() == "old"


def test_a_file_that_cannot_be_written_is_named_and_stays(tmp_path) -> None:
    """Errors of a full disk name no file. An error about another file, which is read meanwhile, keeps its name."""
    file = tmp_path / "x.json"
    file.write_text("old")

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for write, named in ((full, file), (lambda _: (tmp_path / "gone").read_text(), tmp_path / "gone")):
        with pytest.raises(OSError) as refused:
            write_whole(file, write)
        assert str(refused.value.filename) == str(named)
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"] and file.read_text() == "old"


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
