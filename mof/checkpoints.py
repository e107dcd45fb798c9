"""StrictCheckpoints saves and loads multimodal models, and refuses missing and unexpected keys.

The encoders' weights are in the checkpoint, or the encoders are built from their spec.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from encoders import Encoder, build_encoder
from encoders.model_cards import write_section
from encoders.saved_folders import check_folder, recording
from encoders.weight_files import WeightsError
from mof.adapter import build_mixer
from mof.auto_map import OpenedByCode
from mof.config import MoFConfig
from mof.llava.weights import list_faults
from mof.mixer import Mixer
from mof.model_card import HEAD, model_facts
from mof.quantization import language_model_only

ENCODERS_PREFIX = "mixer.encoders."  # keys of the encoders' weights in a state dict
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def build_configured_mixer(config: MoFConfig) -> Mixer:
    """Return the mixer that the config describes.

    Its encoders load their own weights, unless the checkpoint holds the weights or parameters are made on the meta device.

    Raises:
        ValueError: for a config without encoders, and for an encoder that cannot be built on the meta device.
    """
    if not config.encoders:
        raise ValueError("the config names no encoders; make a model with MoFForConditionalGeneration.from_parts")
    empty = nn.Linear(1, 1).weight.is_meta  # under torch.device("meta") or accelerate's init_empty_weights
    encoders = {name: _build(name, spec, empty or config.embed_encoders, empty) for name, spec in config.encoders.items()}
    width = config.embedding_width or config.get_text_config().hidden_size
    mixer = build_mixer(config.fusion, encoders, width, **config.fusion_options)
    return mixer.to("meta") if torch.empty(0).is_meta else mixer


def _build(name: str, spec: dict[str, Any], without_weights: bool, empty: bool) -> Encoder:
    """Return the encoder of a spec. Libraries compute with the tensors of a new encoder, so no tensor but parameters is made empty."""
    try:
        with torch.device("cpu"):
            return build_encoder(**spec, pretrained=not without_weights)
    except Exception as error:  # whatever a library raises that meets an empty tensor
        if not empty:
            raise
        raise ValueError(
            f"encoder {name!r} ({spec['name']}) cannot be built without memory, on the meta device: {error} "
            "Load the model with from_pretrained, which builds its encoders first"
        ) from error


class StrictCheckpoints(OpenedByCode, PreTrainedModel):
    """StrictCheckpoints is a model with a `mixer`, whose checkpoints hold the encoders' weights or refer to them. All keys must fit."""

    config_class = MoFConfig

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save as transformers does, record digests, and write the model's part of the model card, README.md.

        The encoders' weights are saved only with `config.embed_encoders`.
        """
        self._skip_referred_keys()
        with recording(save_directory):
            super().save_pretrained(save_directory, **kwargs)
        if os.path.isdir(save_directory) and kwargs.get("is_main_process", True):
            self._write_card(save_directory)

    def _write_card(self, folder: str | os.PathLike[str]) -> None:
        write_section(folder, "Model", model_facts(self), HEAD)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Upload as transformers does, which has put the hub's card into the folder before."""
        self._write_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _skip_referred_keys(self) -> None:
        """Make transformers leave out the keys of encoders to which the config only refers.

        Raises:
            ValueError: for an encoder with two names whose weights are to be saved, because a file cannot hold a tensor twice.
        """
        encoders: dict[int, str] = {}
        for name, encoder in self.mixer.encoders.items() if self.config.embed_encoders else ():
            if (other := encoders.setdefault(id(encoder), name)) != name:
                raise ValueError(
                    f"encoders {other!r} and {name!r} are the same object, which cannot be saved with its weights under both names: "
                    "build it a second time, or leave embed_encoders=False"
                )
        referred = [] if self.config.embed_encoders else [key for key in self.state_dict() if key.startswith(ENCODERS_PREFIX)]
        self._keys_to_ignore_on_save = set(referred)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        config: MoFConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load as transformers does, but refuse missing and unexpected keys. Encoders that are not saved are built from their spec.

        Raises:
            DamagedError: for files of a folder that were changed since they were saved; the message names them.
            WeightsError: for missing or unexpected keys; the message lists them.
        """
        path = pretrained_model_name_or_path
        check_folder(path, expected=True)
        # torch_dtype is the older name. Neither goes to the config, whose own dtype is the dtype of "auto".
        dtypes = [kwargs.pop(name) for name in ("torch_dtype", "dtype") if name in kwargs]
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **hub, **kwargs)
        if dtypes:
            kwargs["dtype"] = dtypes[-1]
        # Encoders come from several libraries, and few of them can be built inside transformers' meta-device context.
        mixer = build_configured_mixer(config)
        if (quantization := kwargs.get("quantization_config")) is not None:
            with torch.device("meta"):
                kwargs["quantization_config"] = language_model_only(quantization, cls(config, _shell_of(mixer, config.embed_encoders)))
        with init_empty_weights(include_buffers=False):
            plain = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        inner = f"{plain.base_model_prefix}."  # the checkpoint holds a language model with a head, in which the decoder has this name
        if not cls.can_generate() and inner != "model.":  # `mof.base_model` has told transformers about "model."
            kwargs["key_mapping"] = {f"^language_model.{inner}": "language_model."}
        model, info = super().from_pretrained(
            path, *args, config=config, mixer=_shell_of(mixer, config.embed_encoders), output_loading_info=True, **hub, **kwargs
        )
        if not cls.can_generate():
            info["unexpected_keys"] -= {f"language_model.{key}" for key in plain.state_dict() if not key.startswith(inner)}
        _refuse_stray_keys(info, path)
        _complete(model.mixer, mixer, config.embed_encoders)
        _copy_unsaved_buffers(plain.base_model, model.language_model.base_model)
        model._skip_referred_keys()
        return (model, info) if output_loading_info else model

    def adjust_generation_fn(self, *args: Any, mixer: Mixer | None = None, **kwargs: Any) -> None:
        """Hide the mixer from transformers, which would take this argument of `from_pretrained` as a setting of generation."""
        super().adjust_generation_fn(*args, **kwargs)


def _shell_of(mixer: Mixer, embedded: bool) -> Mixer:
    """Return a copy on the meta device, which transformers fills. The copy has encoders only if the checkpoint holds them."""
    memo = {} if embedded else {id(mixer.encoders): nn.ModuleDict()}  # deepcopy takes this ModuleDict as the copy of the encoders
    shell = copy.deepcopy(mixer, memo).to("meta")
    for module in shell.encoders.modules():
        module._is_hf_initialized = True  # otherwise transformers would draw random weights first
    return shell


def _complete(loaded: Mixer, built: Mixer, embedded: bool) -> None:
    """Copy the parts that the checkpoint does not hold from the new mixer `built` into the mixer that transformers `loaded`.

    Encoders that are not in the checkpoint are copied whole. Encoders in the checkpoint lack only the buffers that are never saved.
    """
    if not embedded:
        adapter, hook = next(loaded.parameters()), getattr(loaded, "_hf_hook", None)
        # An adapter that is offloaded lies on the meta device; accelerate's hook knows the device that computes.
        device = hook.execution_device if adapter.is_meta and hook is not None else adapter.device
        loaded.encoders = built.encoders.to(device, adapter.dtype)
        return
    _copy_unsaved_buffers(built.encoders, loaded.encoders)
    for encoder in loaded.encoders.values():
        encoder.requires_grad_(not encoder.frozen)  # the loader makes every parameter trainable


def _copy_unsaved_buffers(built: nn.Module, loaded: nn.Module) -> None:
    """Copy the buffers that no checkpoint holds from a new module, because transformers does not compute all of them again."""
    saved = built.state_dict().keys()
    for key, buffer in built.named_buffers():
        if key not in saved:
            loaded.get_buffer(key).copy_(buffer)


def _refuse_stray_keys(info: dict[str, Any], source: object) -> None:
    """Raise a WeightsError that lists the missing and the unexpected keys of the checkpoint `source`."""
    if faults := list_faults({"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}):
        raise WeightsError(f"the checkpoint {source} does not fit its config.json: {faults}")
