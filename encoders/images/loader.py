"""Many images in a row: decoded in threads ahead of their use, the unreadable ones skipped and listed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar

from PIL import Image

from encoders.images.reading import ImageError, read_image

Source = str | os.PathLike[str] | tuple[str, bytes]  # a file, or the name and the content of one

Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageLoader:
    """Iterates (name, result) of images in the order of their sources; native decoders run side by side in threads.

    Args:
        sources: files, or (name, content) pairs. May be a generator (over a tar, say): it is read as far ahead as `prefetch`.
        workers: threads that decode.
        strict: raise the ImageError of an unreadable image instead of skipping it.
        transform: applied to each RGB image in the worker, as `encoder.pixels`; its outcome is the result.
        prefetch: how many images may be taken from `sources` before the first of them is asked for.

    Attributes:
        failures: name -> reason, of the images skipped so far.

    Raises:
        ImageError: while iterating, with `strict`.
        ValueError: for less than one worker or image ahead.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        workers: int = 2,
        strict: bool = False,
        transform: Callable[[Image.Image], Any] | None = None,
        prefetch: int = 16,
    ) -> None:
        if workers < 1 or prefetch < 1:
            raise ValueError(f"workers and prefetch must be at least 1, got {workers} and {prefetch}")
        self.sources, self.workers, self.strict = sources, workers, strict
        self.transform, self.prefetch = transform, prefetch
        self.failures: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        with closing(in_order(self._load, self.sources, self.workers, self.prefetch)) as loaded:
            for name, result in loaded:
                if not isinstance(result, ImageError):
                    yield name, result
                elif self.strict:
                    raise result
                else:
                    self.failures[name] = str(result)

    def _load(self, source: Source) -> tuple[str, Any]:
        """The result, or the ImageError, by name."""
        name, content = source if isinstance(source, tuple) else (os.fspath(source), source)
        try:
            image = read_image(content, name=name)
            return name, image if self.transform is None else self.transform(image)
        except ImageError as error:
            return name, error


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Generator[Result]:
    """Map in threads, the results in the order of the items; at most `ahead` items are taken before the first one's result."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="image-loader")
    try:
        waiting: deque[Future[Result]] = deque()
        rest = iter(items)
        while True:
            waiting.extend(pool.submit(function, item) for item in islice(rest, ahead - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:  # also when the caller breaks off: what has not begun is dropped, what has is waited for
        pool.shutdown(cancel_futures=True)
