"""Which weights train: all but the image encoder's, or low-rank adapters in the language model (LoRA)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def freeze_encoder(model: PreTrainedModel) -> None:
    """The image encoder, as transformers finds it (Qwen-VL's holds its merger). A model of this library comes with its own frozen.

    Raises:
        ValueError: where transformers finds none.
    """
    if model.config.model_type == "mof":
        return
    encoder = model.get_encoder(modality="image")
    if encoder is model:  # which says that none was found
        raise ValueError(
            f"transformers does not say which part of {type(model).__name__} is the image encoder, so it cannot be frozen; "
            "freeze it yourself and train from Python, with vig.SelectiveTrainer"
        )
    encoder.requires_grad_(False)


def add_lora(model: PreTrainedModel, rank: int) -> Any:
    """The model in PEFT's wrapper: low-rank adapters at all linear layers of the language model train, and nothing else.

    Their scale is 2 (alpha is twice the rank), as in LLaVA.

    Raises:
        ValueError: where peft is missing.
    """
    if find_spec("peft") is None:
        raise ValueError('LoRA needs peft: pip install -e ".[lora]"')
    from peft import LoraConfig, get_peft_model

    inside, head = set(model.get_decoder().modules()), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in inside and module is not head]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
