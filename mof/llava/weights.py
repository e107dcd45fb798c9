"""open_weights reads all weights of a checkpoint folder, from one or more files, and merge_lora adds a LoRA adapter to a model."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from encoders.names import first_names
from encoders.weight_files import WeightsError, read_state, refuse_misfit

KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""Stem and suffix of weight files, as transformers writes them today and as it wrote them earlier. The first kind in a folder is read."""

LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def has_weights(folder: Path) -> bool:
    """Return whether `folder` holds weight files of a model."""
    return any(_index(folder, *kind).is_file() or _shard_names(folder, *kind) for kind in KINDS)


def open_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights in a model's folder, from a single file or from shards with or without an index.

    The files are mapped into memory, so tensors take memory only while they are used.

    Raises:
        WeightsError: for a shard that is missing or unreadable, a key in two shards, or a difference between the index and the shards;
            the message names the shards or keys.
    """
    for kind in KINDS:
        index = _index(folder, *kind)
        weight_map = _read_index(index) if index.is_file() else {}
        names = sorted(set(weight_map.values())) or _shard_names(folder, *kind)
        if not names:
            continue
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise WeightsError(f"{index if weight_map else folder} lacks {', '.join(missing)} of its {len(names)} shards")
        shards = {name: _open(folder / name) for name in names}
        homes: dict[str, str] = {}
        for key, name in [(key, name) for name, shard in shards.items() for key in shard]:
            if homes.setdefault(key, name) != name:
                raise WeightsError(f"{folder}: both {homes[key]} and {name} hold {key}: weights of two checkpoints in one folder?")
        if weight_map and (wrong := sorted({key for key, _ in weight_map.items() ^ homes.items()})):
            raise WeightsError(f"{index} and its shards do not agree on {len(wrong)} keys: {first_names(wrong)}")
        return {key: shards[name][key] for key, name in homes.items()}
    raise WeightsError(f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin, or shards of these")


def _index(folder: Path, stem: str, ending: str) -> Path:
    return folder / f"{stem}{ending}.index.json"


def _read_index(index: Path) -> dict[str, str]:
    """Return key -> name of the key's shard."""
    try:
        return {key: Path(name).name for key, name in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index} cannot be read as an index of shards: {error!r}") from error


def _shard_names(folder: Path, stem: str, ending: str) -> list[str]:
    """Return the name of the single file or of all shards ("-00001-of-00003", ...), or an empty list if the folder holds none of them."""
    if (folder / f"{stem}{ending}").is_file():
        return [f"{stem}{ending}"]
    shards = {file.name for file in folder.glob(f"{stem}-*{ending}")}
    counts = {int(match[1]) for name in shards if (match := re.search(r"-of-(\d+)\.", name))}
    if len(counts) > 1:
        raise WeightsError(f"{folder} holds shards of several checkpoints: {', '.join(sorted(shards))}")
    return sorted(shards.union(f"{stem}-{i:05d}-of-{count:05d}{ending}" for count in counts for i in range(1, count + 1)))


def _open(file: Path) -> dict[str, Tensor]:
    with refuse_misfit(file):
        if file.suffix == ".safetensors":
            return load_file(file)
        # Files of torch before 1.6 are no zip archives and cannot be mapped.
        state = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("expected a mapping of names to tensors")
        # A view of a larger storage could not be saved again.
        return {key: value if value.untyped_storage().nbytes() == value.nbytes else value.clone() for key, value in state.items()}


def is_lora(folder: Path) -> bool:
    """Return whether `folder` holds an adapter of peft."""
    return (folder / LORA_CONFIG).is_file()


def merge_lora(model: Any, folder: Path) -> Any:
    """Return `model` with the LoRA adapter in `folder` added to its weights, with the help of peft.

    Raises:
        ValueError: for a missing file, or keys of the adapter that do not fit; the message names them.
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


def list_faults(faults: Mapping[str, Iterable[object]]) -> str:
    """Return "2 missing: a, b; 1 unexpected: c" for the keys of each kind of fault, or "" without any fault."""
    named = {kind: sorted(map(str, keys)) for kind, keys in faults.items()}
    return "; ".join(f"{len(keys)} {kind}: {first_names(keys)}" for kind, keys in named.items() if keys)
