"""A processor that prepares an image once for several records in a row that are on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers import BatchFeature, ProcessorMixin


def with_remembered_images(processor: ProcessorMixin) -> ProcessorMixin:
    """The same processor, but its image processor gives again what it made of the last images when it is shown the same."""
    remembering = copy.copy(processor)
    remembering.image_processor = RememberedImages(processor.image_processor)
    return remembering


class RememberedImages:
    """An image processor that remembers its last call. In all else it is the one that it was made from."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self._images: list[Any] = []  # kept, since the identity of an object is its own only while it is there
        self._options: dict[str, Any] = {}
        self._made: dict[str, Any] = {}

    def __call__(self, images: Any, **options: Any) -> BatchFeature:
        flat = list(_flat(images))
        same = len(flat) == len(self._images) and all(a is b for a, b in zip(flat, self._images, strict=True))
        if not same or options != self._options:
            self._images, self._options, self._made = flat, options, dict(self._own(images, **options))
        return BatchFeature(dict(self._made))  # another one each time: processors take entries out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for one in images:
            yield from _flat(one)
    else:
        yield images
