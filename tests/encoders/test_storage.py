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

from encoders import storage_lock, whole_files
from encoders.runs import RunLock
from encoders.storage import fetched, located, remove, url_of
from encoders.storage_lock import StorageLock
from encoders.whole_files import write_bytes, write_text

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


def test_a_single_file_is_fetched_and_goes() -> None:
    MEMORY.pipe_file("/run/a", b"x")
    assert fetched("memory://run/a").read_bytes() == b"x"
    MEMORY.rm_file("/run/a")
    assert not fetched("memory://run/a").exists()


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
    assert not MEMORY.exists("/run/_lock-0000") and not files(fetched(folder)).get("_lock-0000")  # in the copy, an empty file may stay


@pytest.mark.parametrize(("machine", "process", "age", "taken"), [
    ("here", 2**22 + 1, 0, True), ("there", 2**22 + 1, 0, False), ("there", 1, 1000, True), ("here", 1, 0, False),
])  # fmt: skip
def test_the_lock_of_a_dead_run_counts_no_more(
    machine: str, process: int, age: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_lock, "BEAT", 0.01)
    monkeypatch.setattr(storage_lock, "SETTLING", 0)
    lock = StorageLock(located("memory://run/_lock-0000"), "here")
    machine = lock._holder["machine"] if machine == "here" else machine
    holder = {"machine": machine, "host": "node", "process": process, "time": time.time() - age}
    MEMORY.pipe_file("/run/_lock-0000", json.dumps(holder).encode())
    if taken:
        lock.take()
        assert json.loads(MEMORY.cat_file("/run/_lock-0000"))["process"] == os.getpid()
    else:
        with pytest.raises(ValueError, match=f"process {process} on node"):
            lock.take()
    lock.release()
    assert MEMORY.exists("/run/_lock-0000") is not taken


def test_a_living_run_renews_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_lock, "BEAT", 0.01)
    lock = StorageLock(located("memory://run/_lock-0000"), whole_files.this_machine())
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


def take_over(age: float = 1000) -> StorageLock:
    """Return the lock of a run on another machine, which took over an old lock."""
    lock = json.loads(MEMORY.cat_file("/run/_lock-0000"))
    MEMORY.pipe_file("/run/_lock-0000", json.dumps({**lock, "time": time.time() - age}).encode())
    other = StorageLock(located("memory://run/_lock-0000"), "there")
    other._holder["machine"] = "there"
    other.take()
    return other


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_that_lost_its_lock_writes_no_more(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_lock, "SETTLING", 0)
    folder = located("memory://run")
    lock = StorageLock(folder / "_lock-0000", "here")
    lock.take()
    write_text(folder / "a", "ours")
    with monkeypatch.context() as patch:
        patch.setattr(storage_lock, "BEAT", 0.01)
        other = take_over()
        storage_lock.HELD.pop(folder), storage_lock.HELD.update({folder: lock.confirm})  # the other's is of another process
    MEMORY.pipe_file("/run/a", b"theirs")
    if ended:
        MEMORY.rm_file("/run/_lock-0000")
    monkeypatch.setattr(storage_lock, "EXPIRY", -1)  # as if this run had slept
    for write in (lambda: write_text(folder / "a", "ours again"), lambda: remove(folder / "a")):
        with pytest.raises(ValueError, match="another run took over memory://run "):
            write()
    lock.release()
    assert MEMORY.cat_file("/run/a") == b"theirs" and MEMORY.exists("/run/_lock-0000") is not ended, "the other's lock stays"
    other.release()


def test_a_lock_that_is_renewed_counts_though_its_clock_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_lock, "BEAT", 0.01)
    lock, now = StorageLock(located("memory://run/_lock-0000"), "here"), time.time
    content = lock._content
    monkeypatch.setattr(lock, "_content", lambda: json.dumps({**json.loads(content()), "time": now() - 1000}).encode())
    lock.take()
    other = StorageLock(located("memory://run/_lock-0000"), "there")
    other._holder["machine"] = "there"
    monkeypatch.setattr(storage_lock.time, "sleep", lambda seconds: lock._renew())
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        other.take()
    lock.release()


def test_what_others_wrote_before_the_lock_was_taken_is_fetched() -> None:
    folder = fetched("memory://run")
    folder.mkdir(parents=True)
    MEMORY.pipe_file("/run/images-00000.parquet", b"another machine's")
    with RunLock(folder):
        assert (folder / "images-00000.parquet").read_bytes() == b"another machine's"


def test_a_refused_run_leaves_the_local_lock_free() -> None:
    folder = fetched("memory://run")
    folder.mkdir(parents=True)
    holder = {"machine": "there", "host": "node", "process": 1, "time": time.time()}
    MEMORY.pipe_file("/run/_lock-0000", json.dumps(holder).encode())
    locks = RunLock(folder), RunLock(folder)  # a notebook keeps the first with its traceback
    for lock in locks:
        with pytest.raises(ValueError, match="process 1 on node"):
            lock.take()


def test_names_with_brackets_are_removed() -> None:
    folder = fetched("memory://run[1]")
    write_text(folder / "a[b]" / "c", "x")
    write_text(folder / "b", "x")
    remove(folder / "a[b]" / "c")
    assert objects("run[1]") == {"b": b"x"}
    remove(folder)
    assert not objects("run[1]") and not folder.exists()


def test_copies_may_lie_in_a_folder_of_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOF_COPIES", str(tmp_path / "mof-vig-copies"))
    folder = fetched("memory://run")
    write_text(folder / "a", "x")
    assert objects("run") == {"a": b"x"} and f"{folder}" == "memory://run"
