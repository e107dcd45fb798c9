"""Copies of folders on other storage, here in the memory of this process."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders import runs, storage
from encoders.runs import RunLock, write_bytes, write_text
from encoders.storage import StorageLock, fetched, located, remove, url_of

MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def own_copies(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOF_COPIES", str(tmp_path_factory.mktemp("machine")))
    yield
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = [""]


def objects(folder: str) -> dict[str, bytes]:
    return {name.removeprefix(f"/{folder}/"): MEMORY.cat_file(name) for name in MEMORY.find(f"/{folder}")}


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("url", ["s3://bucket/a/b", "s3:/bucket/a/b", Path("s3://bucket/a/b"), "s3://bucket//a/b/"])
def test_a_path_in_a_copy_is_shown_as_its_url(url: str | Path) -> None:
    path = located(url)
    for same in (path, pickle.loads(pickle.dumps(path)), located(str(path)), path.absolute(), (path / "c").parent, path.with_name("b")):
        assert f"{same}" == "s3://bucket/a/b" == url_of(Path(str(same))) and str(same).startswith(os.environ["MOF_COPIES"])
    assert f"{path / 'c.json'} is damaged" == "s3://bucket/a/b/c.json is damaged"


def test_other_paths_stay() -> None:
    for path in ("runs/a:b", "C:/runs", "./s3:/x", "a", "/tmp/x"):
        assert located(path) == Path(path) and url_of(located(path)) is None and f"{located(path)}" == str(Path(path))
    assert located("file:///tmp/x") == Path("/tmp/x")
    for wrong in ("s3://bucket/../../x", "s3://"):
        with pytest.raises(ValueError, match=r"s3://.*without '\.\.'"):
            located(wrong)


STEPS = st.lists(
    st.tuples(st.sampled_from(["here", "there", "gone", "removed"]), st.sampled_from("abc"), st.binary(max_size=3)), max_size=12
)


@given(STEPS)
def test_a_copy_is_equal_to_the_storage(steps: list[tuple[str, str, bytes]]) -> None:
    MEMORY.store.clear()
    folder = fetched("memory://run")
    for kind, name, content in steps:
        path = folder / f"sub-{name}" / name
        if kind == "here":
            write_bytes(path, content)
        elif kind == "removed":
            remove(path)
        elif kind == "there":  # another machine
            MEMORY.pipe_file(f"/run/sub-{name}/{name}", content)
        elif MEMORY.exists(f"/run/sub-{name}/{name}"):
            MEMORY.rm_file(f"/run/sub-{name}/{name}")
        if kind in ("here", "removed"):
            assert path.is_file() == MEMORY.exists(f"/run/sub-{name}/{name}")
    assert files(fetched(folder)) == objects("run")


def test_names_in_the_storage_cannot_leave_the_copy() -> None:
    MEMORY.store["/run/../../evil"] = MEMORY.store["/run/good"] = fsspec.implementations.memory.MemoryFile(MEMORY, "/run/good", b"x")
    assert files(fetched("memory://run")).keys() == {"good"}
    assert not list(Path(os.environ["MOF_COPIES"]).rglob("evil"))


def test_a_file_that_cannot_be_uploaded_gets_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetched("memory://run")
    write_text(folder / "a", "old")

    def fail(*arguments: object) -> None:
        raise RuntimeError("no way")

    monkeypatch.setattr(type(MEMORY), "put_file", fail)
    with pytest.raises(OSError, match="memory://run/a cannot be reached.*no way"):
        write_text(folder / "a", "new")
    assert files(folder) == {"a": b"old"}


def test_an_unknown_storage_is_told_by_name() -> None:
    with pytest.raises(ValueError, match="nonsense://bucket/x: .*nonsense"):
        fetched("nonsense://bucket/x")


def test_a_single_run_writes_to_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetched("memory://run")
    folder.mkdir(parents=True)
    with RunLock(folder):
        lock = json.loads(MEMORY.cat_file("/run/_lock-0000"))
        assert lock["process"] == os.getpid()
        other = StorageLock(folder / "_lock-0000", "another machine")
        with pytest.raises(
            ValueError, match=rf"another run is writing to memory://run: process {os.getpid()} on .*memory://run/_lock-0000"
        ):
            other.take()
        other.release()
        assert MEMORY.exists("/run/_lock-0000"), "only its own lock is deleted"
    assert not MEMORY.exists("/run/_lock-0000") and (folder / "_lock-0000").is_file() and not files(fetched(folder))["_lock-0000"]


@pytest.mark.parametrize(("machine", "process", "age", "taken"), [
    ("here", 2**22 + 1, 0, True), ("there", 2**22 + 1, 0, False), ("there", 1, 1000, True), ("here", 1, 0, False),
])  # fmt: skip
def test_the_lock_of_a_dead_run_counts_no_more(machine: str, process: int, age: float, taken: bool) -> None:
    holder = {"machine": machine, "host": "node", "process": process, "time": time.time() - age}
    MEMORY.pipe_file("/run/_lock-0000", json.dumps(holder).encode())
    lock = StorageLock(located("memory://run/_lock-0000"), "here")
    if taken:
        lock.take()
        assert json.loads(MEMORY.cat_file("/run/_lock-0000"))["process"] == os.getpid()
    else:
        with pytest.raises(ValueError, match=f"process {process} on node"):
            lock.take()
    lock.release()
    assert MEMORY.exists("/run/_lock-0000") is not taken


def test_a_living_run_renews_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BEAT", 0.01)
    lock = StorageLock(located("memory://run/_lock-0000"), runs._machine())
    lock.take()
    first = MEMORY.cat_file("/run/_lock-0000")
    for _ in range(1000):
        if MEMORY.cat_file("/run/_lock-0000") != first:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the lock stayed as it was")
    lock.release()
    assert not MEMORY.exists("/run/_lock-0000")
