"""LoRA folders: adapters of peft, and what LLaVA's training saves beside them. The package peft merges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from encoders.weight_files import WeightsError, read_state, refuse_misfit
from mof.llava.keys import full_projector_names
from mof.llava.weight_shards import first

CONFIG, BESIDE = "adapter_config.json", "non_lora_trainables.bin"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def is_lora(folder: Path) -> bool:
    """Whether `folder` holds an adapter of peft."""
    return (folder / CONFIG).is_file()


def trained_beside_lora(folder: Path) -> dict[str, Tensor]:
    """The projectors that LLaVA trains beside the LoRA, by the names that they have in a whole checkpoint."""
    if not (folder / BESIDE).is_file():
        return {}
    state = read_state(folder / BESIDE)
    return {name: state[key] for name, key in full_projector_names(state, folder / BESIDE).items()}


def merge_lora(model: Any, folder: Path) -> Any:
    """`model` with the adapter of `folder` added to its weights.

    Raises:
        ValueError: naming the file that is missing, or each key of the adapter that does not fit.
    """
    try:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    except ImportError as error:
        raise ValueError("LoRA folders need the package peft: pip install 'mof-vig[lora]'") from error
    file = next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder} holds none of {', '.join(ADAPTERS)} beside its {CONFIG}")
    state = read_state(file)
    with refuse_misfit(folder):
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        wrapped = get_peft_model(model, config)
        report: Any = set_peft_model_state_dict(wrapped, state)
    missing = [key for key in report.missing_keys if "lora_" in key or "modules_to_save" in key]
    faults = {"missing": sorted(missing), "unexpected": sorted(report.unexpected_keys)}
    if any(faults.values()):
        text = "; ".join(f"{len(keys)} {fault}: {first(keys)}" for fault, keys in faults.items() if keys)
        raise WeightsError(f"the adapter {file} does not fit its base: {text}")
    return wrapped.merge_and_unload()
