"""`mof train` needs these before the first step: trainer arguments, records that were tried, and the weights that train."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import HfArgumentParser, PreTrainedModel, ProcessorMixin, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.pytorch_utils import Conv1D

from encoders.images.reading import ImageError
from mof.data.collator import SupervisedCollator
from mof.data.digests import digest, record_id, unselected
from mof.data.records import RecordError, require_unchanged, to_record
from mof.data.rows import read_records

NAMES = sorted(field.name for field in dataclasses.fields(TrainingArguments) if field.init)
logger = logging.getLogger(__name__)
NAMED = 3  # problems in a message
MOST_MISSED = 0.5  # share of the weights in the blocks that have no adapters


class _Parser(HfArgumentParser):
    """_Parser raises an error, where argparse prints a page and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"--set: {message}")


def parse_arguments(texts: Sequence[str], own: Mapping[str, str]) -> dict[str, Any]:
    """Return {"weight_decay": 0.1} for ["weight_decay=0.1"].

    Args:
        own: name of an argument that has its own option -> the option.

    Raises:
        ValueError: for a text of another form, an unknown name or a name in `own`, and a value of another type.
    """
    given = {}
    for text in texts:
        name, equals, _ = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, such as weight_decay=0.1; got {text!r}")
        if name in own:
            raise ValueError(f"--set {name}: give {own[name]} instead")
        if name == "group_by_length":  # its name before transformers 5
            raise ValueError("--set group_by_length: give --set train_sampling_strategy=group_by_length instead")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES) or ["see transformers.TrainingArguments"]
            raise ValueError(f"--set: there is no {name!r}; {', '.join(near)}?")
        given[name] = f"--{text}"
    values = vars(_Parser(TrainingArguments, allow_abbrev=False).parse_args(list(given.values())))
    if "report_to" in given:
        _require_installed(values["report_to"])
    return {name: values[name] for name in given}


def _require_installed(reporters: str | Sequence[str]) -> None:
    names, installed = [reporters] if isinstance(reporters, str) else reporters, get_available_reporting_integrations()
    for name in set(names) - {"none", "all", *installed}:
        raise ValueError(f"--set report_to={name}: it is not installed, or unknown; installed are {', '.join(installed) or 'none'}")


def require_apart(training: Sequence[Mapping[str, Any]], evaluation: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError for records that are in training and in evaluation, even if other tokens are selected there."""
    trained = {digest(unselected(record)) for record in training}
    if both := [record_id(record) for record in evaluation if digest(unselected(record)) in trained]:
        raise ValueError(f"{len(both)} of the {len(evaluation)} records of --eval-records are in --records, too, the first is {both[0]!r}")


def read_training_records(path: Path, processor: ProcessorMixin, image_folder: Path, max_length: int) -> list[dict[str, Any]]:
    """Return the raw records of a file, each with an answer and with images that exist.

    The shortest, a middle and the longest record are tried. So a selection for another tokenizer, a chat template that changes the
    answers, and a `max_length` that leaves no room for an image are found now and not hours later.

    Raises:
        RecordError: naming the first records that cannot be used, with the reason, and their number.
        ValueError: for no records, or a folder that does not exist.
    """
    if not image_folder.is_dir():
        raise ValueError(f"{image_folder} is no folder: --images is the folder that relative image paths of the records start from")
    raw = [record if isinstance(record, Mapping) else {"messages": record} for record in read_records(path)]
    if not raw:
        raise ValueError(f"{path} holds no records to train on")
    lengths, problems = [], []
    for record in raw:
        try:
            lengths.append(_check(record, image_folder))
        except RecordError as error:
            problems.append(str(error))
    if problems:
        raise RecordError(
            f"{path}: {len(problems)} of {len(raw)} records cannot be used; correct them or take them out: {'; '.join(problems[:NAMED])}"
        )
    by_length = sorted(range(len(raw)), key=lambda index: lengths[index])
    tried = {by_length[place] for place in (0, len(raw) // 2, -1)}
    collator, errors = SupervisedCollator(processor, max_length, image_folder, strict=True), []
    for index in tried:
        try:
            collator([raw[index]])
        except (RecordError, ImageError) as error:
            errors.append(str(error))
    if len(errors) == len(tried):
        raise RecordError(f"{path}: none of the {len(tried)} records that were tried can be used, the first because: {errors[0]}")
    return [dict(record) for record in raw]


def _check(raw: Mapping[str, Any], image_folder: Path) -> int:
    """Return the number of characters in the record's text. RecordError for a record that cannot be trained on."""
    require_unchanged(raw)
    record = to_record(raw, image_folder)
    if not any(message["role"] == "assistant" for message in record.messages):
        raise RecordError(f"record {record.id!r}: no answer to learn from")
    return sum(len(part.get("text", "")) for message in record.messages for part in message["content"])


def freeze_encoder(model: PreTrainedModel) -> None:
    """Freeze the image encoder, as transformers finds it (in Qwen-VL it includes the merger). Models of this library freeze it themselves.

    Raises:
        ValueError: if transformers finds no image encoder.
    """
    if model.config.model_type == "mof":
        return
    encoder = model.get_encoder(modality="image")
    if encoder is model:  # then transformers knows none
        raise ValueError(
            f"transformers does not say which part of {type(model).__name__} is the image encoder, so it cannot be frozen; "
            "freeze it yourself and train from Python, with vig.SelectiveTrainer"
        )
    encoder.requires_grad_(False)


def add_lora(model: PreTrainedModel, rank: int) -> Any:
    """Return the model in PEFT's wrapper. Only low-rank adapters train, at all weight matrices of the language model's blocks.

    These are the matrices of linear layers (torch's, and transformers' Conv1D in GPT-2 and others) and the fused experts of mixtures,
    each expert with adapters of its own. Their scale is 2 (alpha is twice the rank), as in LLaVA. A warning names large matrices of
    modules of other classes: they get no adapters.

    Raises:
        ValueError: if peft is missing, or for a language model that has no linear layers, or keeps more than half of the weights of its
            blocks in another way (DBRX's experts).
    """
    if find_spec("peft") is None:
        raise ValueError('LoRA needs peft: pip install "mof-vig[lora]"')
    from peft import LoraConfig, get_peft_model

    linear, own = _matrices(model)
    if not linear:
        raise ValueError(f"{type(model.get_decoder()).__name__} has no linear layer for LoRA to adapt; train without LoRA")
    largest = max(own_weight.numel() for module in linear.values() for own_weight in module.parameters(recurse=False))
    fused = [name for name, weight in own.items() if weight.ndim == 3 and 4 * weight.numel() >= largest]
    if missed := [name for name, weight in own.items() if weight.ndim == 2 and weight.numel() >= largest]:
        weights = [*own.values(), *(weight for module in linear.values() for weight in module.parameters(recurse=False))]
        share = sum(own[name].numel() for name in missed) / sum(weight.numel() for weight in weights)
        if share > MOST_MISSED:
            raise ValueError(
                f"LoRA reaches {1 - share:.0%} of the weights in the blocks of {type(model.get_decoder()).__name__}: {len(missed)} large "
                f"matrices are kept in a way that peft cannot adapt, the first is {missed[0]}; train without LoRA"
            )
        logger.warning("LoRA: %d large matrices get no adapters and stay as they are, the first is %s", len(missed), missed[0])
    transposed = all(isinstance(module, Conv1D) for module in linear.values())
    targets = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(linear), target_parameters=fused or None, fan_in_fan_out=transposed
    )
    return get_peft_model(model, targets)


def _matrices(model: PreTrainedModel) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """Return the linear layers in the blocks of the language model, and the parameters that modules of other classes keep, both by name.

    Mixtures keep the matrices of their experts in a parameter, [experts, out, in]. Its size tells it from the parameters of routers,
    biases and recurrences.
    """
    inside, head = set(model.get_decoder().modules()), model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules() if module in inside and module is not head}
    linear = {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
    other = {name: module for name, module in modules.items() if name not in linear and not isinstance(module, (nn.Embedding, _ConvNd))}
    return linear, {f"{name}.{key}": own for name, module in other.items() for key, own in module.named_parameters(recurse=False)}
