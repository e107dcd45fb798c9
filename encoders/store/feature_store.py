"""FeatureStore reads features by row, by name or by content. The features are memory-mapped."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from encoders.base import Encoder
from encoders.digests import DamagedError, damaged
from encoders.images.opening import ImageError, read_file
from encoders.images.sources import content_key, readable
from encoders.preprocessing import View
from encoders.storage import fetched
from encoders.store.files import VIEW, file_state, pack_keys, read_index, read_view, unpack, unpack_keys
from encoders.store.fingerprints import describe, refuse_other
from encoders.store.manifest import read_manifest, run_of, shards_of
from encoders.store.rows import Rows
from encoders.store.shards import AGAIN, Shard

# Shapes: N = images of the store, n = rows that are read, E = width of an embedding, T = h*w patch tokens, D = width of a patch token,
# F = sum of h*w*D over the encoders.

logger = logging.getLogger(__name__)


class FeatureStore:
    """FeatureStore reads the features that `encode_images` (`mof encode`) wrote. Each image content has a row, the same for all encoders.

    The rows are the images whose files the last complete run found, so deleted and renamed files are left out. Images that are not
    encoded by all `encoders` yet, because the writer was stopped, are left out too, with a warning. A store can be sent to other
    processes at little cost, because each process maps the files again. Digests are checked when features are read, unless the
    environment has MOF_CHECK=off.

    Args:
        path: the store's folder, or its URL (`encoders.storage`), which is downloaded first.
        encoders: the names in the store of the encoders to open; by default all encoders.

    Attributes:
        encoders: the names of the opened encoders.
        keys: [N] content key of each row (`encoders.images.sources.content_key`).
        names: [N] path under which the content was seen first. The name of a tar's member is "path of the tar/name in the tar".
        manifest: the entry of each encoder: spec, fingerprint, view, grid, width, embed_dim, tokens, dtype.

    Raises:
        ValueError: for a folder that is no store, an encoder that is not in the store, or a store without an encoded image.
        DamagedError: for a file that was changed, also when features are read; the message names it.
        ForeignError: for a file of another store; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str], encoders: Sequence[str] | None = None) -> None:
        self.path = fetched(path)
        manifest = read_manifest(self.path)
        self._store = manifest["store"]
        self.manifest: dict[str, dict[str, Any]] = manifest["encoders"]
        self.encoders = list(self.manifest if encoders is None else encoders)
        if unknown := [name for name in self.encoders if name not in self.manifest]:
            raise ValueError(f"{path} has no features of {', '.join(unknown)}; it has {', '.join(self.manifest) or 'none'}")
        shards = {name: shards_of(self.path, self.manifest[name]) for name in self.encoders}
        self._refuse_missing(shards, manifest.get("shards", {}))
        listed = manifest.get("files", {})
        if faults := damaged(self.path, {VIEW: listed[VIEW]} if VIEW in listed else {}):
            raise DamagedError(f"{'; '.join(faults.values())}; the same `mof encode` again writes it anew")
        keys = {name: [Shard(file, run_of(manifest, name)).keys for file in files] for name, files in shards.items()}
        order = self._read_index([np.concatenate([*parts, pack_keys([])]) for parts in keys.values()])  # [N]
        self._features = {name: Rows(shards[name], keys[name], order, self.names) for name in self.encoders}
        self.keys = unpack_keys(order)
        self._row_of_key = {key: row for row, key in enumerate(self.keys)}
        self._files: dict[str, tuple[int, int, str]] | None = None  # name -> size, time, key; filled on first use

    def _refuse_missing(self, shards: Mapping[str, list[Path]], listed: Mapping[str, list[str]]) -> None:
        """Raise a DamagedError if shards that the last complete run listed are missing."""
        for name, there in shards.items():
            if lost := sorted(set(listed.get(name, ())) - {shard.name for shard in there}):
                missing = self.path / self.manifest[name]["folder"] / lost[0]
                raise DamagedError(f"{missing} is missing{f', with {len(lost) - 1} more' if lost[1:] else ''}: {AGAIN}")

    def _read_index(self, encoded: list[NDArray[np.bytes_]]) -> NDArray[np.bytes_]:
        """Set `names`, and return the keys [N] that all encoders have, in the order in which they were added to the index."""
        index = read_index(self.path, self._store)
        names, keys = index["name"].to_pylist(), pack_keys(index["key"].to_pylist())
        last = dict(zip(names, range(len(names)), strict=True))  # a changed file's latest entry
        view = read_view(self.path, self._store)
        if view is not None and (lost := view - last.keys()):
            raise DamagedError(f"{self.path}: the index lacks {len(lost)} images, such as {min(lost)}: run the same `mof encode` again")
        current = np.sort(np.fromiter((place for name, place in last.items() if view is None or name in view), np.int64))
        unique, first_name = np.unique(keys[current], return_index=True)
        _, first = np.unique(keys, return_index=True)
        wanted = np.ones(len(unique), bool)
        for have in encoded:
            wanted &= np.isin(unique, have)
        if not wanted.any():
            raise ValueError(f"{self.path} holds no image that {', '.join(self.encoders) or 'any encoder'} has encoded; run `mof encode`")
        if missing := len(unique) - int(wanted.sum()):
            logger.warning(
                "%s: %d of %d images are not encoded by all of %s and are left out; the same `mof encode` again encodes them",
                self.path, missing, len(unique), ", ".join(self.encoders),
            )  # fmt: skip
        age = first[np.searchsorted(keys[first], unique[wanted])]
        order = np.argsort(age)
        self.names = [names[current[i]] for i in first_name[wanted][order]]
        return unique[wanted][order]

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        lines = [f"FeatureStore {self.path}: {len(self):,} images"]
        for name in self.encoders[:8]:
            entry = self.manifest[name]
            embeddings = f"embeddings of {entry['embed_dim']} numbers" if entry["embeddings"] else "no embeddings"
            tokens = f"{' x '.join(map(str, entry['grid']))} tokens of {entry['width']} channels in {entry['tokens']}"
            lines.append(f"  {name}: {embeddings}, {tokens if entry['tokens'] else 'no patch tokens'}")
        return "\n".join(lines + [f"  and {len(self.encoders) - 8} more encoders"] * (len(self.encoders) > 8))

    def grid(self, encoder: str) -> tuple[int, int]:
        """Return (h, w), the grid of the encoder's patch tokens."""
        height, width = self._entry(encoder)["grid"]
        return height, width

    def embeddings(self, encoder: str) -> NDArray[np.float32]:
        """Return embeddings [N, E] of unit norm, as `Encoder.embed_image` gives them. After a complete run they are memory-mapped.

        Raises:
            ValueError: if the store has no embeddings of this encoder.
            DamagedError: if an embedding was changed; the message names the file and the image.
        """
        if not self._entry(encoder)["embeddings"]:
            raise ValueError(f"{self.path} has no embeddings of {encoder}, only its patch tokens")
        return self._features[encoder].embeddings()  # [N, E]

    def joined(self, encoder: str, *, write: bool = False) -> Path:
        """Return the path of the file with the embeddings of all shards in a single piece. `write` makes the file if it is missing."""
        if write:
            self._features[encoder].join()
        return self._features[encoder].joined

    def tokens(self, encoder: str, rows: Any) -> Tensor:
        """Return the patch tokens [n, T, D] of rows. Only these rows are read from the files.

        Args:
            rows: indices (a list, array or CPU tensor), a boolean mask or a slice.

        Returns:
            float32 if int8 is stored, else float16 or bfloat16 as stored.

        Raises:
            ValueError: if the store has no patch tokens of this encoder.
            DamagedError: if tokens were changed; the message names the file and the image.
        """
        if self._entry(encoder)["tokens"] is None:
            raise ValueError(f"{self.path} has no patch tokens of {encoder}; encode them with `--tokens int8` into another store")
        chosen = np.arange(len(self))[rows if isinstance(rows, slice) else np.asarray(rows, None if len(rows) else np.int64)]  # [n]
        features = self._features[encoder]
        scales = features.gather("scales", chosen) if self._entry(encoder)["tokens"] == "int8" else None  # [n, T]
        return unpack(features.gather("tokens", chosen), scales)  # [n, T, D]

    def row_of(self, image: str | os.PathLike[str] | bytes) -> int:
        """Return the row of an image, which is found by its content.

        A file is not read if its name, size and time are the same as when it was encoded, or was looked up last.

        Args:
            image: a file (at any place), a file's bytes, a content key, or a name in the store.

        Raises:
            ValueError: for an image that is not in the store; the message names it.
        """
        key = content_key(image) if isinstance(image, bytes) else self._key_of(os.fspath(image))
        row = self._row_of_key.get(key)
        if row is None:
            what = f"the image with content key {key}" if isinstance(image, bytes) else f"{image} (content key {key})"
            raise ValueError(f"{what} is not in the feature store {self.path} of {len(self)} images; encode it with `mof encode`")
        return row

    def _key_of(self, image: str) -> str:
        if image in self._row_of_key:
            return image
        if self._files is None:
            index = read_index(self.path, self._store)
            rows = zip(*(index[column].to_pylist() for column in ("name", "bytes", "mtime_ns", "key")), strict=True)
            self._files = {name: (size, time, key) for name, size, time, key in rows}
        name = readable(image)
        size, time, key = self._files.get(name, (None, None, ""))
        try:
            state = file_state(os.stat(image))
        except OSError:
            if key:
                return key
            raise ValueError(f"{image} is neither a file nor a name or content key in the feature store {self.path}") from None
        if state != (size, time):
            key = content_key(read_file(image))
            self._files[name] = (*state, key)
        return key

    def check(self, name: str, encoder: Encoder, view: View | None = None) -> None:
        """Check that the features stored as `name` come from this encoder, with images as in `view`.

        Raises:
            ValueError: if they come from another encoder or view; the message has both fingerprints and the parts that differ.
        """
        refuse_other(self.path, name, self._entry(name), describe(encoder, view))

    def _entry(self, encoder: str) -> dict[str, Any]:
        if encoder not in self._features:
            raise ValueError(f"{encoder!r} is not among the opened encoders of {self.path}: {', '.join(self.encoders)}")
        return self.manifest[encoder]


@dataclass(frozen=True, eq=False)
class StoredImage:
    """A stored image is an image in the form of its features."""

    key: str
    """Key of the image's content, which is equal for the same file under several names."""
    features: Tensor
    """[F], a row of the model's `encoder_features`: the tokens [h*w, D] of the encoders, flattened and joined."""


class StoredImages:
    """StoredImages looks up images in a store by content, for a multimodal model. Like `read_image`, it is called with a path.

    Args:
        store: a store with patch tokens, which `mof encode --model --tokens` wrote.
        encoders: the model's encoders, `model.mixer.encoders`, in the order of the features.
        view: the model's view of an image, `processor.image_processor.view`; for null images, the same view with `blurred`.

    Raises:
        ValueError: for a store without these encoders, or whose features come from other encoders with the same names.
    """

    def __init__(self, store: FeatureStore, encoders: Mapping[str, Encoder], view: View) -> None:
        for name, encoder in encoders.items():
            store.check(name, encoder, view)
        self.store, self.names, self.view = store, list(encoders), view

    @property
    def description(self) -> dict[str, str]:
        """Return encoder -> fingerprint and format of its features (JSON-able, for manifests)."""
        entries = {name: self.store.manifest[name] for name in self.names}
        return {name: f"{entry['fingerprint']} {entry['tokens']}" for name, entry in entries.items()}

    def __call__(self, image: str | os.PathLike[str] | Image.Image) -> StoredImage:
        """Return the features of an image file.

        Raises:
            ImageError: for an image that is not in the store, or is not given as a file.
        """
        if not isinstance(image, (str, os.PathLike)):
            raise ImageError(f"images in a feature store are looked up by their files, got a {type(image).__name__}")
        try:
            row = self.store.row_of(image)
        except ValueError as error:
            raise ImageError(str(error)) from error
        tokens = [self.store.tokens(name, [row]).flatten() for name in self.names]  # [h*w*D] each
        return StoredImage(self.store.keys[row], torch.cat(tokens))
