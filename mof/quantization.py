"""When a model is loaded in 8 or 4 bits, only the language model is quantized."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert

LEFT_OUT = ("llm_int8_skip_modules", "modules_to_not_convert")  # field of BitsAndBytesConfig, field of the other configs
QUANTIZED = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")  # attributes of quantized models


def language_model_only(quantization: Any, model: PreTrainedModel) -> Any:
    """Return a copy of a quantization config that leaves out the mixer, because adapters and encoders are small, and sensitive.

    Unless the config lists modules to leave out, the copy also leaves out the modules that transformers leaves out by default: the
    output head, and the embeddings that are tied to it.

    Args:
        quantization: the argument `quantization_config` of `from_pretrained`, for example a `BitsAndBytesConfig`, or its dict.
        model: a model with the same modules, which may be on the meta device.
    """
    config = AutoQuantizationConfig.from_dict(dict(quantization)) if isinstance(quantization, dict) else copy.deepcopy(quantization)
    if name := next((name for name in LEFT_OUT if hasattr(config, name)), None):
        given = getattr(config, name)
        setattr(config, name, sorted({"mixer", *(get_keys_to_not_convert(model) if given is None else given)}))
    return config


def adopt_quantization(model: PreTrainedModel, llm: PreTrainedModel) -> None:
    """Mark `model` as quantized if its language model is quantized, so that transformers saves, loads and trains it in this way."""
    if getattr(llm, "hf_quantizer", None) is None:
        return
    for name in QUANTIZED:
        if hasattr(llm, name):
            setattr(model, name, getattr(llm, name))
    model.config.quantization_config = language_model_only(llm.config.quantization_config, model)
    del llm.config.quantization_config  # otherwise config.json would hold it twice, because this config is `model.config.text_config`
