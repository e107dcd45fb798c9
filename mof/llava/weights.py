"""The weights of a checkpoint folder: one mapping, however many files they lie in, read when asked for; and LoRA adapters."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from encoders.weight_files import WeightsError, read_state, refuse_misfit

KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""Stem and ending of the weight files that transformers writes today and used to write. The first kind in a folder is read."""

LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class WeightShards(Mapping[str, Tensor]):
    """A mapping of keys to tensors. The files are mapped into memory, so tensors cost memory only while they are used.

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
    """Return whether `folder` holds weight files of a model."""
    return any(_index(folder, *kind).is_file() or _files(folder, *kind) for kind in KINDS)


def open_weights(folder: Path) -> WeightShards:
    """Return the weights of a model's folder: one file, or shards with or without an index.

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
    """Return the single file, or the complete shards, numbered "-00001-of-00003"."""
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


def is_lora(folder: Path) -> bool:
    """Return whether `folder` holds an adapter of peft."""
    return (folder / LORA_CONFIG).is_file()


def merge_lora(model: Any, folder: Path) -> Any:
    """Return `model` with the LoRA adapter of `folder` added to its weights, by peft.

    Raises:
        ValueError: naming the file that is missing, or each key of the adapter that does not fit.
    """
    try:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict  # optional
    except ImportError as error:
        raise ValueError("LoRA folders need the package peft: pip install 'mof-vig[lora]'") from error
    file = next((folder / name for name in LORA_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder} holds none of {', '.join(LORA_WEIGHTS)} beside its {LORA_CONFIG}")
    state = read_state(file)
    with refuse_misfit(folder):
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        wrapped = get_peft_model(model, config)
        report: Any = set_peft_model_state_dict(wrapped, state)
    missing = [key for key in report.missing_keys if "lora_" in key or "modules_to_save" in key]
    if faults := list_faults({"missing": missing, "unexpected": report.unexpected_keys}):
        raise WeightsError(f"the adapter {file} does not fit its base: {faults}")
    return wrapped.merge_and_unload()


def first(keys: list[str], count: int = 20) -> str:
    """Return the first of `keys` as text for a message."""
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")


def list_faults(faults: Mapping[str, Iterable[object]]) -> str:
    """Return "2 missing: a, b; 1 unexpected: c" for the keys of each kind of fault; an empty text where there is none."""
    named = {kind: sorted(map(str, keys)) for kind, keys in faults.items()}
    return "; ".join(f"{len(keys)} {kind}: {first(keys)}" for kind, keys in named.items() if keys)
