"""These functions load saved models onto the GPU or in 4 bits, open the stores of their features, and name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel, ProcessorMixin

from encoders import FeatureStore, StoredImages
from encoders.saved_models import load_network, load_processor


def load_model(folder: Path, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model with its processor. The model is put on the GPU if there is a GPU.

    Raises:
        ValueError: for a folder without a model.
    """
    processor = load_processor(folder, trust_remote_code=options.get("trust_remote_code", False))
    return load_network(folder, **options).to("cuda" if torch.cuda.is_available() else "cpu"), processor


def load_in_4bit(folder: Path, *, bf16: bool = False, **options: Any) -> PreTrainedModel:
    """Load the model with the matrices of its language model in 4 bits (NF4), on the GPU of this process if there is a GPU.

    Only LoRA trains such a model. Image encoders, projectors, embeddings and output head stay as they are, except that float16 becomes
    bfloat16. The processor must be loaded before.

    Args:
        bf16: multiply in bfloat16, also in a float32 model. A model in half precision always does.
        options: the options of `load_network`.

    Raises:
        ValueError: where bitsandbytes is not installed, or for a model that is quantized already.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError('4 bits need bitsandbytes: pip install "mof-vig[quantized]"')
    safe = {"trust_remote_code": options.get("trust_remote_code", False)}
    config = AutoConfig.from_pretrained(folder, **safe)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantized already: give the folder of the whole model, into which LoRA is merged at the end")
    compute = torch.float32 if config.dtype == torch.float32 and not bf16 else torch.bfloat16
    if config.dtype == torch.float16:
        options["dtype"] = torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    if config.model_type != "mof":  # models of this library leave out the mixer and the head by themselves
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, **safe)
        inside = set(model.get_decoder().modules())
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        quantization.llm_int8_skip_modules = [name for name, module in linear.items() if module not in inside]
    device = PartialState().device if torch.cuda.is_available() else "cpu"
    small = load_network(folder, quantization_config=quantization, device_map={"": device}, **options)
    for module in small.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):  # after an evaluation, these layers on a CPU would pass no gradient on
            module.support_avx512bf16_for_cpu = False
    return small


def stored_images(model: PreTrainedModel, processor: ProcessorMixin, store: Path, blurred: bool = False) -> StoredImages:
    """Open the features that `mof encode --model` wrote with this model's encoders.

    Raises:
        ValueError: for a model that is not of this library, or a store of other encoders or images.
    """
    if model.config.model_type != "mof":
        raise ValueError(f"a feature store serves models of this library, not a {model.config.model_type} model")
    view = replace(processor.image_processor.view, blurred=blurred)
    return StoredImages(FeatureStore(store, list(model.mixer.encoders)), model.mixer.encoders, view)


def model_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Return name -> folder. If two folders have the same name, the whole paths are the names."""
    alike = len({folder.name for folder in folders}) < len(folders)
    return {str(folder) if alike else folder.name: folder for folder in folders}
