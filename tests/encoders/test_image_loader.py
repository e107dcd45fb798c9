"""Many images: in order, ahead of their use but not too far, past the broken ones, and no thread left behind."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.pictures import encoded

from encoders import ImageError, ImageLoader, read_image
from encoders.images.resizing import _compiled_resize, compiled_resize


def png(value: int) -> bytes:
    return encoded(Image.new("RGB", (4, 3), (value, value, value)))


def value(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0, 0])


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("image-loader")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert loader_threads() == []


def test_files_come_in_order_under_their_own_names(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.png" for index in range(40)]
    for index, file in enumerate(files):
        file.write_bytes(png(index))
    loader = ImageLoader(files, workers=3, prefetch=5)
    got = list(loader)
    assert [name for name, _ in got] == [str(file) for file in files]
    assert all(np.array_equal(image, read_image(file)) for (_, image), file in zip(got, files, strict=True))
    assert loader.failures == {}


def test_order_stays_when_early_images_take_longest() -> None:
    def slow(image: Image.Image) -> int:
        time.sleep(0.02 if value(image) % 4 == 0 else 0)
        return value(image)

    sources = [(str(index), png(index)) for index in range(20)]
    assert list(ImageLoader(sources, workers=4, transform=slow)) == [(str(index), index) for index in range(20)]


def test_unreadable_images_are_skipped_and_listed(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jpg"
    sources = [("a", png(1)), ("cut", png(2)[:30]), missing, ("b", png(3)), ("empty", b""), ("text", b"<html>")]
    loader = ImageLoader(sources, transform=value)
    assert list(loader) == [("a", 1), ("b", 3)]
    assert list(loader.failures) == ["cut", str(missing), "empty", "text"]
    assert all(name in reason for name, reason in loader.failures.items())


def test_strict_raises_where_the_broken_image_stands() -> None:
    images = iter(ImageLoader([("a", png(1)), ("b", png(2)), ("cut", png(2)[:30]), ("c", png(3))], strict=True, transform=value))
    assert [next(images), next(images)] == [("a", 1), ("b", 2)]
    with pytest.raises(ImageError, match="cut"):
        next(images)


def test_a_mistake_in_the_transform_is_no_broken_image() -> None:
    with pytest.raises(ZeroDivisionError):
        list(ImageLoader([("a", png(1))], transform=lambda image: 1 // 0))


def test_no_image_is_taken_further_ahead_than_prefetch() -> None:
    taken = 0

    def sources() -> Iterator[tuple[str, bytes]]:
        nonlocal taken
        for index in range(50):
            taken += 1
            yield str(index), png(index)

    for used, _ in enumerate(ImageLoader(sources(), workers=2, prefetch=7), start=1):
        assert taken <= used + 6  # the one in hand was the first of the seven
    assert taken == 50


def test_no_sources_and_fewer_than_prefetch() -> None:
    assert list(ImageLoader([])) == []
    assert len(list(ImageLoader([("a", png(1))], prefetch=100))) == 1


def test_nothing_begins_after_the_caller_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, over, shutdown = [], threading.Event(), ThreadPoolExecutor.shutdown

    def wait_for_the_end(image: Image.Image) -> int:
        begun.append(value(image))
        assert value(image) == 0 or over.wait(600)
        return value(image)

    def shut_down(pool: ThreadPoolExecutor, **options: Any) -> None:
        shutdown(pool, **options | {"wait": False})
        over.set()
        shutdown(pool)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut_down)
    for _ in ImageLoader([(str(index), png(index)) for index in range(100)], workers=2, prefetch=50, transform=wait_for_the_end):
        break
    assert loader_threads() == []
    assert len(begun) <= 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_threads_end_when_an_exception_falls_into_the_loop(error: type[BaseException]) -> None:
    def sources() -> Iterator[tuple[str, bytes]]:
        yield from [(str(index), png(index)) for index in range(20)]
        raise error

    with pytest.raises(error):
        for _ in ImageLoader(sources(), prefetch=4):
            pass
    assert loader_threads() == []


def test_work_happens_in_the_given_number_of_threads() -> None:
    names: set[str] = set()
    three = threading.Barrier(3, timeout=600)

    def record(image: Image.Image) -> None:
        names.add(threading.current_thread().name)
        three.wait()

    list(ImageLoader([(str(index), png(index)) for index in range(30)], workers=3, transform=record))
    assert len(names) == 3
    assert all(name.startswith("image-loader") for name in names)


@pytest.mark.parametrize("options", [{"workers": 0}, {"prefetch": 0}])
def test_nonsense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="0"):
        ImageLoader([], **options)


def test_threads_that_start_together_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import of the compiled resize fails in a thread while the others ask for it."""

    class NoNumba:
        def find_spec(self, name, path=None, target=None):
            if name == "numba":
                time.sleep(0.2)
                raise ModuleNotFoundError("no numba", name=name)

    monkeypatch.setattr("sys.meta_path", [NoNumba(), *sys.meta_path])
    for name in ("numba", "encoders.images.compiled_resize"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("encoders.images.compiled_resize", raising=False)
    monkeypatch.setattr("encoders.images.resizing._compiled_resize", lru_cache(_compiled_resize.__wrapped__))
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: compiled_resize(), range(4))) == [None] * 4
