"""The weights of a checkpoint folder as one mapping, however many files they lie in; nothing is read before it is asked for."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from encoders.weight_files import WeightsError, refuse_misfit

KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""Stem and ending of the weight files that transformers writes, now and formerly; the first that is there is read."""


class WeightShards(Mapping[str, Tensor]):
    """Keys to tensors. The files are mapped into memory, so tensors cost memory only while they are used.

    Args:
        files: the shards, .safetensors, or torch files read with weights_only=True.

    Raises:
        WeightsError: naming the file that is missing or unreadable, or the key that two files hold.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._shards: dict[Path, Mapping[str, Tensor]] = {}
        self.file_of: dict[str, Path] = {}
        for file in files:
            self._shards[file] = _open(file)
            for key in self._shards[file]:
                if key in self.file_of:
                    raise WeightsError(f"both {self.file_of[key]} and {file} hold {key}: weights of two checkpoints in one folder?")
                self.file_of[key] = file

    def __getitem__(self, key: str) -> Tensor:
        file = self.file_of[key]
        with refuse_misfit(file):
            tensor = self._shards[file][key]
        # A view of a larger storage, which torch files may hold, could not be saved again.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)


class _Safetensors(Mapping[str, Tensor]):
    """One .safetensors file, mapped into memory."""

    def __init__(self, file: Path) -> None:
        self._file = safe_open(file, "pt")
        self._keys = list(self._file.keys())

    def __getitem__(self, key: str) -> Tensor:
        return self._file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _open(file: Path) -> Mapping[str, Tensor]:
    if not file.is_file():
        raise WeightsError(f"{file} is missing")
    with refuse_misfit(file):
        if file.suffix == ".safetensors":
            return _Safetensors(file)
        # Files of torch before 1.6 are no zip archives and cannot be mapped.
        state = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("expected a mapping of names to tensors")
        return state


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds weight files of a model."""
    return any(_index(folder, *kind).is_file() or _files(folder, *kind) for kind in KINDS)


def open_weights(folder: Path) -> WeightShards:
    """The weights of a model's folder: one file, or shards with or without an index.

    Raises:
        WeightsError: naming each shard that is missing, and each key that the index and the shards do not agree on.
    """
    for kind in KINDS:
        index = _index(folder, *kind)
        if index.is_file():
            return _open_indexed(index)
        if files := _files(folder, *kind):
            return WeightShards(files)
    raise WeightsError(f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin, or shards of these")


def _index(folder: Path, stem: str, ending: str) -> Path:
    return folder / f"{stem}{ending}.index.json"


def _files(folder: Path, stem: str, ending: str) -> list[Path]:
    """The single file, or the shards, numbered "-00001-of-00003" and complete."""
    single = folder / f"{stem}{ending}"
    if single.is_file():
        return [single]
    shards = sorted(folder.glob(f"{stem}-*{ending}"))
    counts = {int(match[1]) for file in shards if (match := re.search(r"-of-(\d+)$", file.stem))}
    if len(counts) > 1:
        raise WeightsError(f"{folder} holds shards of several checkpoints: {', '.join(file.name for file in shards)}")
    for count in counts:
        wanted = [folder / f"{stem}-{i:05d}-of-{count:05d}{ending}" for i in range(1, count + 1)]
        if missing := [file.name for file in wanted if not file.is_file()]:
            raise WeightsError(f"{folder} lacks {', '.join(missing)} of its {count} shards")
    return shards


def _open_indexed(index: Path) -> WeightShards:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted({index.parent / Path(name).name for name in weight_map.values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index} cannot be read as an index of shards: {error!r}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise WeightsError(f"{index} lists shards that are missing: {', '.join(missing)}")
    shards = WeightShards(files)
    wrong = {key for key in weight_map.keys() | shards.keys() if weight_map.get(key) != getattr(shards.file_of.get(key), "name", None)}
    if wrong:
        raise WeightsError(f"{index} and its shards do not agree on {len(wrong)} keys: {first(sorted(wrong))}")
    return shards


def first(keys: list[str], count: int = 20) -> str:
    """The first of `keys`, for a message."""
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
