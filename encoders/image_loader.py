"""Many images in a row: decoded in threads ahead of their use, the unreadable ones skipped and listed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from PIL import Image

from encoders.images import ImageError, read_image

Source = str | os.PathLike[str] | tuple[str, bytes]  # a file, or the name and the content of one


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
        sources = iter(self.sources)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="image-loader")
        try:
            ahead: deque[tuple[str, Future[Any]]] = deque()
            while True:
                for source in islice(sources, self.prefetch - len(ahead)):
                    ahead.append((_name(source), pool.submit(self._load, source)))
                if not ahead:
                    return
                name, future = ahead.popleft()
                try:
                    result = future.result()
                except ImageError as error:
                    if self.strict:
                        raise
                    self.failures[name] = str(error)
                else:
                    yield name, result
        finally:  # also when the caller breaks off: what has not begun is dropped, what has is waited for
            pool.shutdown(cancel_futures=True)

    def _load(self, source: Source) -> Any:
        image = read_image(source[1], name=source[0]) if isinstance(source, tuple) else read_image(source)
        return image if self.transform is None else self.transform(image)


def _name(source: Source) -> str:
    return source[0] if isinstance(source, tuple) else os.fspath(source)
