"""NewImages reads and hashes the images of a run in threads, and makes items of the images that an encoder lacks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from encoders.cluster import grown
from encoders.images.loader import in_order
from encoders.images.opening import ImageError, ImageLimits, read_file
from encoders.images.sources import Content as Source
from encoders.images.sources import ImageSources, content_key
from encoders.store.files import ImageIndex, file_state, next_number
from encoders.store.items import Content, EncodeItem
from encoders.store.manifest import run_of, shards_of
from encoders.store.shards import sound_keys
from encoders.whole_files import remove_unfinished

SHARD_BYTES, SHARD_IMAGES, READ_BYTES = 2**28, 65_536, 2**27
"""An item ends when its shard holds this many bytes or images, or when the files of its images have this many bytes."""


class ReadImage(NamedTuple):
    """A ReadImage is an image as a thread has read it."""

    name: str
    key: str = ""
    stat: tuple[int, int] | None = None
    """Bytes and time of a file."""
    data: bytes | None = None
    """Its content, unless everything about the image is known."""
    error: ImageError | None = None


class NewImages:
    """NewImages holds the images of a run. `_read` runs in threads, everything else in the main thread.

    Attributes:
        names: name -> content key of the images so far; "" if it is not known.
        known: encoder -> keys of the images that it has encoded, or is about to encode.
        waiting: the images of each item on its way, also the images that are not sent with it because their features are known.
    """

    def __init__(self, store: Path, manifest: Mapping[str, Any], encoders: list[str], index: ImageIndex, limits: ImageLimits) -> None:
        self.encoders, self.index, self.limits = encoders, index, limits
        self._entries = {name: manifest["encoders"][name] for name in encoders}
        self.known: dict[str, set[str]] = {}
        self._numbers: dict[str, set[int]] = {}  # encoder -> numbers of its shards
        for name, entry in self._entries.items():
            (store / entry["folder"]).mkdir(exist_ok=True)
            remove_unfinished(store / entry["folder"])
            files = shards_of(store, entry)
            self.known[name] = sound_keys(files, run_of(manifest, name))
            self._numbers[name] = {next_number([file]) - 1 for file in files}
        self.names, self.waiting = dict[str, str](), deque[list[ReadImage]]()
        self._reasons = dict[str, str]()  # name or key -> why the image cannot be read or encoded
        self._sent = set[str]()  # keys that were sent along with an item

    def items(self, sources: ImageSources, batch_size: int, workers: int) -> Generator[EncodeItem]:
        """Read all images, and yield items of those that an encoder lacks, in the order of the sources.

        The limits of items depend on the sources alone, not on the features that are known: a run that goes on after a kill makes
        the same batches as if it had not been killed.
        """
        largest = min(SHARD_IMAGES, max(SHARD_BYTES // max(map(self._bytes_of, self.encoders)), 1))
        position = number = size = 0
        images, contents = list[ReadImage](), list[Content]()
        with closing(in_order(self._read, sources, workers, 2 * workers + batch_size)) as stream:
            for image in stream:
                if image.name in self.names:
                    continue  # sources that overlap
                self.names[image.name] = image.key
                images.append(image._replace(data=None))
                size += image.stat[0] if image.stat else len(image.data or b"")
                contents += self._wanted(image)
                if len(images) >= grown(position, batch_size, largest) or size >= READ_BYTES:
                    yield self._item(number, images, contents)
                    position, number, size = position + len(images), number + 1, 0
                    images, contents = [], []
        if images:
            yield self._item(number, images, contents)

    def _item(self, number: int, images: list[ReadImage], contents: list[Content]) -> EncodeItem:
        self.waiting.append(images)
        return EncodeItem({name: number + (max(taken) + 1 if number in taken else 0) for name, taken in self._numbers.items()}, contents)

    def _bytes_of(self, encoder: str) -> int:
        """Return the bytes of an encoder's features of an image."""
        entry = self._entries[encoder]
        width = {None: 0, "int8": entry["width"] + 4}.get(entry["tokens"], 2 * entry["width"])
        return entry["grid"][0] * entry["grid"][1] * width + 4 * (entry["embed_dim"] or 0) * entry["embeddings"] + 16

    def _read(self, source: tuple[str, Source]) -> ReadImage:
        """Read and hash an image, unless everything about it is known."""
        name, content = source
        try:
            if isinstance(content, ImageError):
                raise content
            stat, key = None, None
            if isinstance(content, Path):
                stat = file_state(_stat(content))
                key = self.index.key_of(name, *stat)
                if key is not None and not self._lacking(key):
                    return ReadImage(name, key, stat)
                content = read_file(content, self.limits)
            return ReadImage(name, key or content_key(content), stat, content)
        except ImageError as error:
            return ReadImage(name, error=error)

    def _wanted(self, image: ReadImage) -> list[Content]:
        """Return the image's content if an encoder lacks it or nobody knows its size."""
        if image.error is not None:
            self._reasons[image.name] = str(image.error)
            return []
        lacking = self._lacking(image.key)
        if image.data is None or image.key in self._sent or not (lacking or not self.index.knows(image.key)):
            return []
        self._sent.add(image.key)
        for encoder in lacking:
            self.known[encoder].add(image.key)
        return [Content(image.key, image.name, image.data, lacking)]

    def _lacking(self, key: str) -> tuple[str, ...]:
        return tuple(encoder for encoder in self.encoders if key not in self.known[encoder])

    def fail(self, key: str, reason: str) -> None:
        """Note why the image with this content key cannot be read or encoded. It is tried again in the next run."""
        self._reasons[key] = reason
        for keys in self.known.values():
            keys.discard(key)

    def reason(self, name: str) -> str | None:
        """Return why a name of this run failed, None if it did not."""
        reason = self._reasons.get(self.names[name])
        return self._reasons.get(name) if reason is None else f"{name}: {reason}"

    def failures(self) -> dict[str, str]:
        """Return the names of this run that failed, with the reasons, in the order of the sources."""
        return {name: reason for name in self.names if (reason := self.reason(name))} if self._reasons else {}


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except (OSError, ValueError) as error:  # a line of a list may hold a zero byte
        raise ImageError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
