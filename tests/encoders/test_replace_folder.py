"""A folder or a file is replaced as a whole, whatever stops the process."""

import errno
import os
from pathlib import Path

import pytest

from encoders import whole_files


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
            whole_files.write_whole(file, write)
        assert str(refused.value.filename) == str(named)
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"] and file.read_text() == "old"
