"""Loading a multimodal checkpoint: strict about keys, with encoders that lie in the file or are built from their spec."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from encoders import build_encoder
from mof.adapter import build_mixer
from mof.config import MoFConfig
from mof.llava.weights import list_faults
from mof.mixer import Mixer


def build_configured_mixer(config: MoFConfig) -> Mixer:
    """The mixer that the config describes; encoders with their own weights unless those lie in the checkpoint."""
    if not config.encoders:
        raise ValueError("the config names no encoders; make a model with MoFForConditionalGeneration.from_parts")
    encoders = {name: build_encoder(**spec, pretrained=not config.embed_encoders) for name, spec in config.encoders.items()}
    return build_mixer(config.fusion, encoders, config.get_text_config().hidden_size, **config.fusion_options)


def shell_of(mixer: Mixer, embedded: bool) -> Mixer:
    """A copy without memory, for transformers' loader to fill; without encoders unless those lie in the checkpoint."""
    memo = {} if embedded else {id(mixer.encoders): nn.ModuleDict()}  # deepcopy takes this for the encoders' copy
    shell = copy.deepcopy(mixer, memo).to("meta")
    for module in shell.encoders.modules():
        module._is_hf_initialized = True  # or transformers would draw random weights first
    return shell


def complete(loaded: Mixer, built: Mixer, embedded: bool) -> None:
    """Give the mixer that transformers `loaded` what the checkpoint does not hold, from the same mixer freshly `built`.

    By reference that is the encoders. Embedded, it is their buffers that are never saved: the loader leaves them undefined.
    """
    if not embedded:
        adapter = next(loaded.parameters())
        loaded.encoders = built.encoders.to(adapter.device, adapter.dtype)
        return
    saved = built.encoders.state_dict().keys()
    for key, buffer in built.encoders.named_buffers():
        if key not in saved:
            loaded.encoders.get_buffer(key).copy_(buffer)
    for encoder in loaded.encoders.values():
        encoder.requires_grad_(not encoder.frozen)  # the loader makes every parameter trainable


def refuse_stray_keys(info: dict[str, Any], source: object) -> None:
    """Raise a ValueError that lists the keys which the checkpoint `source` misses or has too many."""
    if faults := list_faults({"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}):
        raise ValueError(f"the checkpoint {source} does not fit its config.json: {faults}")
