"""Images are encoded item by item: an item is a run of images whose features become one shard of each encoder."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from encoders.base import Encoder
from encoders.cluster import file_number
from encoders.images.loader import in_order
from encoders.images.opening import ImageError, ImageLimits
from encoders.images.reading import read_image
from encoders.preprocessing import View
from encoders.store.files import pack
from encoders.store.manifest import run_of
from encoders.store.shards import write_shard

# Shapes: B = images of a batch, S = side of an encoder's input, E = width of an embedding, T = patch tokens, D = their width.


class Content(NamedTuple):
    """Content is an image of an item."""

    key: str
    """Its content key."""
    name: str
    """A name of the image, for messages."""
    data: bytes
    """Its file."""
    lacking: tuple[str, ...]
    """The encoders that have not encoded it. There may be none, if only its size is not known."""


@dataclass(frozen=True)
class EncodeItem:
    """An EncodeItem holds images that are encoded together."""

    numbers: dict[str, int]
    """The number of the shard of each encoder."""
    contents: list[Content]
    part: int = 1
    """1 for a whole item; the halves of part n are 2n and 2n + 1."""

    def halves(self) -> list[EncodeItem]:
        middle = len(self.contents) // 2
        both = (self.contents[:middle], self.contents[middle:])
        return [replace(self, contents=half, part=2 * self.part + n) for n, half in enumerate(both)] if middle else []

    def number(self, encoder: str) -> int:
        """Return the number of the encoder's shard."""
        return file_number(self.numbers[encoder], self.part)


class Outcome(NamedTuple):
    """An outcome holds the sizes and the failures of an item's images, by content key."""

    sizes: dict[str, tuple[int, int]]
    """Width and height."""
    unreadable: dict[str, str]
    """Why an image cannot be read."""
    refused: dict[str, str]
    """Why an encoder's features of an image are not stored: they are not finite."""


class ItemEncoder:
    """ItemEncoder is the function that encodes an item. It writes the shards, and returns the `Outcome`.

    Args:
        encoders: by their names in the store. A copy of an encoder is used where device, dtype or mode must change, because casting
            back would not restore it.
        manifest: the manifest of the store.
        store: the folder of the store, which all processes see.
        device: "auto" is the GPU of the process, if it has a GPU; None leaves the encoders where they are.
        workers: threads that decode.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        manifest: Mapping[str, Any],
        store: Path,
        view: View | None,
        limits: ImageLimits,
        *,
        batch_size: int,
        device: str | torch.device | None,
        dtype: torch.dtype | None,
        workers: int,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoders = {name: _placed(encoder, device, dtype) for name, encoder in encoders.items()}
        self.manifest, self.store, self.view, self.limits = manifest, store, view, limits
        self.batch_size, self.workers = batch_size, workers

    def __call__(self, item: EncodeItem) -> Outcome:
        outcome = Outcome({}, {}, {})
        rows: dict[str, list[_Rows]] = {name: [] for name in self.encoders}
        copied: list[_Copied] = []  # the features of the batch before travel while the device works on the next batch
        with closing(in_order(self._load, item.contents, self.workers, 2 * self.workers + self.batch_size)) as stream:
            while batch := list(islice(stream, self.batch_size)):
                outcome.unreadable.update((content.key, loaded) for content, loaded in batch if isinstance(loaded, str))
                images = [(content, loaded) for content, loaded in batch if not isinstance(loaded, str)]
                outcome.sizes.update((content.key, loaded.size) for content, loaded in images)
                before, copied = copied, []
                for name in rows:
                    if pixels := {content.key: loaded.pixels[name] for content, loaded in images if name in loaded.pixels}:
                        copied.append(_Copied(name, list(pixels), *self._features(name, list(pixels.values()))))
                self._take(before, rows, outcome.refused)
        self._take(copied, rows, outcome.refused)
        for name, parts in rows.items():
            self._write(name, item.number(name), [(keys, features) for keys, features in parts if keys])
        return outcome

    def _load(self, content: Content) -> tuple[Content, _Loaded | str]:
        """Return an image's size, and its pixels for each encoder that lacks it; or the reason why it has none."""
        try:
            image = read_image(content.data, content.name, self.limits)
            if self.view is None:
                pixels = {name: self.encoders[name].pixels(image) for name in content.lacking}  # [3, S, S] each
            else:
                pixels = dict.fromkeys(content.lacking, self.view.pixels(image) if content.lacking else torch.empty(0))
            return content, _Loaded(image.size, pixels)
        except ImageError as error:
            return content, str(error).removeprefix(f"{content.name}: ")
        except Exception as error:  # an error of any library: an image of an odd shape costs this image alone
            return content, f"cannot be prepared ({type(error).__name__}: {error})"

    def _take(self, copied: list[_Copied], rows: dict[str, list[_Rows]], refused: dict[str, str]) -> None:
        """Wait for the features of a batch and add them to the rows of their encoders. Features that are not finite are `refused`."""
        for name, keys, features, arrived in copied:
            if arrived is not None:
                arrived.synchronize()
                features = {kind: values.clone() for kind, values in features.items()}  # the pinned memory serves the next batches
            finite = features.pop("finite").tolist()  # [B]
            if not all(finite):
                hint = "; values above 65504 do not fit float16: store them as bfloat16 or int8"
                small = self.manifest["encoders"][name]["tokens"] == "float16"
                reason = f"{name} gives features that are not finite{hint if small else ''}"
                refused.update((key, reason) for key, good in zip(keys, finite, strict=True) if not good)
                features = {kind: values[torch.tensor(finite)] for kind, values in features.items()}
                keys = [key for key, good in zip(keys, finite, strict=True) if good]
            rows[name].append((keys, features))

    @torch.inference_mode()
    def _features(self, name: str, images: list[Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Return the features of B images [3, S, S] by kind, and whether they are "finite" [B], all in the CPU's memory.

        The second value is None, or the event after which the features have arrived there.
        """
        encoder, entry = self.encoders[name], self.manifest["encoders"][name]
        device = next(encoder.tower.parameters()).device
        on_gpu = device.type == "cuda"
        pixels = torch.empty(len(images), *images[0].shape, dtype=images[0].dtype, pin_memory=on_gpu)  # [B, 3, S, S]
        pixels = torch.stack(images, out=pixels).to(device, non_blocking=on_gpu)  # [B, 3, S, S]
        features: dict[str, Tensor] = {}
        if entry["embeddings"] and entry["tokens"] is not None:
            features["embeddings"], patches = encoder.embed_with_tokens(pixels)  # [B, E], [B, T, D]
            features |= pack(patches.tokens, entry["tokens"])
        elif entry["embeddings"]:
            features["embeddings"] = encoder.embed_image(pixels)  # [B, E]
        else:
            features |= pack(encoder(pixels).tokens, entry["tokens"])  # [B, T, D]
        floats = [values for values in features.values() if values.is_floating_point()]
        features["finite"] = torch.stack([values.flatten(1).isfinite().all(1) for values in floats]).all(0)  # [B]
        if not on_gpu:
            return {kind: values.cpu() for kind, values in features.items()}, None
        copies = {kind: values.to("cpu", non_blocking=True) for kind, values in features.items()}  # into pinned memory
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(device))
        return copies, arrived

    def _write(self, name: str, number: int, batches: list[_Rows]) -> None:
        """Write the features of all batches as a shard. No images make no shard."""
        if not batches:
            return
        shard = {kind: torch.cat([features[kind] for _, features in batches]) for kind in batches[0][1]}  # [n, ...]
        metadata = {"encoder": name}  # for readers of single files
        if "errors" in shard:
            errors = shard.pop("errors").double()  # [n, T]
            metadata["errors"] = json.dumps([float(errors.sum()), errors.numel(), float(errors.max())])
        path = self.store / self.manifest["encoders"][name]["folder"] / f"features-{number:05d}.safetensors"
        write_shard(path, [key for keys, _ in batches for key in keys], shard, metadata, run_of(self.manifest, name))


_Rows = tuple[list[str], dict[str, Tensor]]
"""Content keys of images, and their features by kind."""


class _Copied(NamedTuple):
    """_Copied holds the features of a batch on their way into the CPU's memory."""

    encoder: str
    keys: list[str]
    features: dict[str, Tensor]
    arrived: torch.cuda.Event | None


class _Loaded(NamedTuple):
    """_Loaded holds an image as the encoders take it."""

    size: tuple[int, int]
    """Width and height."""
    pixels: dict[str, Tensor]
    """[3, S, S] by encoder."""


def _placed(encoder: Encoder, device: str | torch.device | None, dtype: torch.dtype | None) -> Encoder:
    parameter = next(encoder.tower.parameters())
    device, dtype = torch.device(device or parameter.device), dtype or parameter.dtype
    if (parameter.device, parameter.dtype, encoder.training) == (device, dtype, False):
        return encoder
    return copy.deepcopy(encoder).eval().to(device, dtype)
