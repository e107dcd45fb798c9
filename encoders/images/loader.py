"""ImageLoader decodes images in threads, ahead of their use. Unreadable images are skipped and listed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar

from PIL import Image

from encoders.images.opening import ImageError, ImageLimits
from encoders.images.reading import read_image

Source = str | os.PathLike[str] | tuple[str, str | os.PathLike[str] | bytes]  # a file; or a name, and a file or its content

Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageLoader:
    """ImageLoader iterates over (name, result) of images, in the order of their sources. Several threads decode at the same time.

    Args:
        sources: files, or pairs of a name and a file or its content. A generator (over a tar, for example) is read `prefetch` images ahead.
        workers: the number of threads that decode.
        strict: raise the ImageError of an unreadable image instead of skipping it.
        transform: a function from an RGB image to its result, for example `encoder.pixels`; it runs in the threads. By default the
            image itself is the result.
        prefetch: the number of images that may be taken from `sources` before the caller takes the first result.
        limits: the largest files and images that are read; by default the limits of the environment (`ImageLimits`).

    Attributes:
        failures: name -> reason, for the images that were skipped so far.

    Raises:
        ImageError: while iterating, with `strict`.
        ValueError: when `workers` or `prefetch` is below 1.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        workers: int = 2,
        strict: bool = False,
        transform: Callable[[Image.Image], Any] | None = None,
        prefetch: int = 16,
        limits: ImageLimits | None = None,
    ) -> None:
        if workers < 1 or prefetch < 1:
            raise ValueError(f"workers and prefetch must be at least 1, got {workers} and {prefetch}")
        self.sources, self.workers, self.strict = sources, workers, strict
        self.transform, self.prefetch, self.limits = transform, prefetch, limits
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
        """Return the name of an image with its result or its ImageError."""
        name, content = source if isinstance(source, tuple) else (os.fspath(source), source)
        try:
            image = read_image(content, name, self.limits)
            return name, image if self.transform is None else self.transform(image)
        except ImageError as error:
            return name, error


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int, prepare: Callable[[], object] | None = None
) -> Generator[Result]:
    """Call the function in threads, after `prepare` in each thread. Yield the results in the order of the items.

    At most `ahead` items wait at a time.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="image-loader", initializer=prepare)
    try:
        waiting: deque[Future[Result]] = deque()
        rest = iter(items)
        while True:
            waiting.extend(pool.submit(function, item) for item in islice(rest, ahead - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:  # also when the caller stops early: waiting calls are dropped, running calls are awaited
        pool.shutdown(cancel_futures=True)
