"""plan makes the plan of a training run before anything is downloaded: it builds all models on the meta device, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from encoders import Encoder, build_encoder
from mof.adapter import Mixer, build_mixer
from mof.language_models import MINI_LM
from study.memory import FOUR_BITS, GIB, GPU, Layer
from study.settings import Setting
from vig.output_head import GRADIENT_CHUNK

CAPTION_TOKENS = 128
"""Text tokens of the longest stage 1 record in a batch: LLaVA's captions and prompts have fewer."""


@dataclass(frozen=True)
class Plan:
    """A plan holds the sizes, steps and memory of a setting. `study.plan_tables` shows them."""

    setting: Setting
    devices: int
    encoders: dict[str, int]
    """Parameters of each encoder's vision tower. A text tower takes no part in training and is not counted."""
    adapters: int
    llm: int
    """Parameters of the language model, without the row that an `<image>` token may add to its embeddings."""
    lora: int
    """Parameters of LoRA in stage 2."""
    trainable: dict[str, int]
    """Trained parameters by stage."""
    tokens_per_image: int
    """The largest number of visual tokens of an image. Tiles count with the thumbnail, at their largest number."""
    steps: dict[str, int | None]
    """Stage -> steps. "finetune, VIG" has the selected records only. None where the number of records is not known."""
    tokens: dict[str, int]
    """Stage -> tokens of a record: visual tokens and a caption, or the longest record that max_length allows."""
    config: PreTrainedConfig
    """The configuration of the language model."""
    layer: Layer
    decoder_layer: int
    """Parameters of one decoder layer."""
    embeddings: int
    """Parameters of the input and output embeddings."""
    adapter_bytes: int
    """Bytes that the adapters keep for the backward pass, per image."""
    image_operations: float
    """Floating point operations of the encoders' forward pass, per image."""

    @property
    def width(self) -> int:
        """Return the bytes of a number outside the master weights."""
        return 2 if self.setting.bf16 else 4

    @property
    def total(self) -> int:
        return sum(self.encoders.values()) + self.adapters + self.llm

    def activations(self, stage: str, checkpointed: bool) -> int:
        """Return the bytes of activations at their peak, for a forward pass of a GPU.

        With `checkpointed`, these are the input of every decoder layer, and the larger of a recomputed layer and the logits, because
        these two are not alive at the same moment. Otherwise, they are all layers and the logits. In both cases the adapters hold an
        image per record. The trainer makes the logits of `GRADIENT_CHUNK` tokens at a time. A logit takes 14 bytes: 2 in bf16, and 4
        each as fp32, as log-softmax and as its gradient.
        """
        records, _ = self.setting.stages[stage].split(self.devices)
        tokens = records * self.tokens[stage]
        layer = tokens * self.layer.saved(stage == "finetune", self.width, self.setting.stages[stage].lora or 0)
        logits = min(tokens, GRADIENT_CHUNK) * self.config.vocab_size * (14 if self.width == 2 else 12)
        adapters, layers = records * self.adapter_bytes, self.config.num_hidden_layers
        if checkpointed:
            return adapters + tokens * self.layer.hidden * self.width * layers + max(layer, logits)
        return adapters + layer * layers + logits

    def memory(self, stage: str, sharded: bool, checkpointed: bool) -> dict[str, float]:
        """Return the parts of the estimate for a stage ("align", "finetune"), in bytes per GPU."""
        trainable, share = self.trainable[stage], self.devices if sharded else 1
        frozen_encoders = sum(self.encoders.values()) + self.adapters - self.trainable["align"]
        lora, small = self.setting.stages[stage].lora, self.setting.stages[stage].load_in_4bit
        frozen = self.total - frozen_encoders - (0 if lora else trainable)
        sizes = [inputs * outputs for inputs, outputs in self.layer.matrices]
        in_4bit = sum(sizes) * self.config.num_hidden_layers if small else 0
        copies = (trainable if self.width < 4 else 0) + (max(sizes) if small else 0)
        gathered = 2 * self.decoder_layer + self.embeddings if sharded else copies
        return {
            "weights": (4 * trainable + self.width * (frozen - in_4bit) + FOUR_BITS * in_4bit) / share + self.width * frozen_encoders,
            "gradients": 4 * trainable / share,
            "optimizer": 8 * trainable / share,
            "gathered": gathered * self.width,
            "activations": self.activations(stage, checkpointed),
        }


def fits(memory: dict[str, float], gpu: int = GPU) -> bool:
    """Return whether a GPU with this memory, in GiB, is enough."""
    return sum(memory.values()) <= 0.9 * gpu * GIB


def plan(setting: Setting, devices: int = 8) -> Plan:
    """Return the plan of a setting on this many GPUs. It reads no weights, and needs no network when `llm_config` is given.

    Raises:
        ValueError: for a language model whose config is neither in the setting nor in a local folder, or that is not of the
            Llama kind; for a batch that cannot be split over the devices; for images that leave no room for text.
    """
    config = _llm_config(setting)
    with torch.device("meta"):
        encoders = {name: build_encoder(**spec, pretrained=False) for name, spec in setting.encoders.items()}
        mixer = build_mixer(setting.fusion, encoders, config.hidden_size, **setting.mixer_options)
        llm = AutoModelForCausalLM.from_config(config)
    shown = 1 if setting.max_tiles == 1 else 1 + setting.max_tiles  # a large image has a thumbnail and tiles
    visual_tokens = shown * mixer.tokens_per_image
    if visual_tokens >= setting.max_length:
        raise ValueError(f"{visual_tokens} visual tokens leave no room for text in max_length {setting.max_length}")
    adapters = sum(p.numel() for name, p in mixer.named_parameters() if not name.startswith("encoders."))
    towers = {name: _vision_size(spec) for name, spec in setting.encoders.items()}
    mixer_trainable = adapters + sum(towers[name] for name, encoder in encoders.items() if not encoder.frozen)
    for stage in setting.stages.values():
        stage.split(devices)
    head, table = llm.get_output_embeddings(), llm.get_input_embeddings()
    layer = _layer(config)
    lora = (setting.finetune.lora or 0) * sum(map(sum, layer.matrices)) * config.num_hidden_layers
    return Plan(
        setting=setting,
        devices=devices,
        encoders=towers,
        adapters=adapters,
        llm=_size(llm),
        lora=lora,
        trainable={"align": mixer_trainable, "finetune": lora or mixer_trainable + _size(llm)},
        tokens_per_image=visual_tokens,
        steps=_steps(setting),
        tokens={"align": min(setting.max_length, visual_tokens + CAPTION_TOKENS), "finetune": setting.max_length},
        config=config,
        layer=layer,
        decoder_layer=_size(llm.model.layers[0]),
        embeddings=_size(nn.ModuleList([head, table])),
        adapter_bytes=shown * _adapter_bytes(mixer, 2 if setting.bf16 else 4),
        image_operations=shown * sum(map(_operations, encoders.values())),
    )


def _llm_config(setting: Setting) -> PreTrainedConfig:
    if setting.llm_config is not None:
        values = dict(setting.llm_config)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    folder = MINI_LM if setting.llm == "mini-lm" else Path(setting.llm)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{setting.name}: the architecture of {setting.llm!r} is not known here; give it as llm_config in the setting, or "
            "give a local folder with a config.json as llm"
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _layer(config: Any) -> Layer:
    try:
        return Layer(
            hidden=config.hidden_size,
            queries=config.num_attention_heads * config.head_dim,
            keys=config.num_key_value_heads * config.head_dim,
            mlp=config.intermediate_size,
        )
    except AttributeError as error:
        kind = config.model_type
        raise ValueError(f"memory is estimated for language models of the Llama kind, not for {kind}: {error}") from error


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _vision_size(spec: dict[str, Any]) -> int:
    """Return the number of parameters that get a gradient from an image."""
    with torch.device("meta"):
        encoder = build_encoder(**{**spec, "trainable": True}, pretrained=False)
        pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
        seen = encoder(pixels).tokens if encoder.embed_dim is None else encoder.embed_image(pixels)
        seen.sum().backward()
    return sum(parameter.numel() for parameter in encoder.parameters() if parameter.grad is not None)


def _operations(encoder: Encoder) -> float:
    """Return the operations of the forward pass for an image. The encoder is on the meta device."""
    pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pixels)
    return float(counter.get_total_flops())


def _adapter_bytes(mixer: Mixer, width: int) -> int:
    """Return the bytes per image: the input of each linear layer of the adapters, and the input of their GELU."""
    per_position = 0
    for name, part in mixer.named_modules():
        if isinstance(part, nn.Linear) and not name.startswith("encoders."):
            # Each adapter's first linear layer maps to hidden_size: the GELU keeps its output.
            per_position += part.in_features + (part.out_features if name.endswith(".0") else 0)
    return width * per_position * mixer.positions


def _steps(setting: Setting) -> dict[str, int | None]:
    """Return the optimizer steps by stage."""
    records = {
        "align": (setting.align, setting.data.align_records),
        "finetune": (setting.finetune, setting.data.finetune_records),
        "finetune, VIG": (setting.finetune, setting.selected_records),
    }
    return {name: None if count is None else stage.steps(count) for name, (stage, count) in records.items()}
