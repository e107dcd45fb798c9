"""What makes two scoring runs the same run: model, processor, null image, length, seed and versions, as digests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from mof.data.records import digest

# Entries of a config that saving, loading or training fill in and that no forward pass depends on.
_LABELS = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"}
_LABELS |= {"bos_token_id", "eos_token_id", "pad_token_id"}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # integer type by bytes per element, 8 as two of 4
_CHUNK = 2**20  # elements that are summed at a time, so that a large weight needs little memory


def scoring_identity(
    model: PreTrainedModel, processor: ProcessorMixin, null: Mapping[str, Any], max_length: int, seed: int
) -> dict[str, Any]:
    """The part of the manifest that must be equal for a run to be resumed (JSON-able)."""
    return {
        "model": type(model).__name__,
        "config": digest(_without_labels(model.config.to_dict())),
        "weights": weights_fingerprint(model),
        **processor_identity(processor),
        "null": dict(null),
        "max_length": max_length,
        "seed": seed,
        "versions": {name: _version(name) for name in ("mof-vig", "torch", "transformers")},
    }


def processor_identity(processor: ProcessorMixin) -> dict[str, str]:
    """Digests of what makes tokens of a record."""
    tokenizer = processor.tokenizer
    return {
        "processor": digest(processor.to_dict()),
        "tokenizer": _tokenizer_digest(tokenizer),
        "chat_template": digest(processor.chat_template or tokenizer.chat_template),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line per entry that differs, nested entries as "versions.torch"."""
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key}: {before!r} there, {now!r} now"


def weights_fingerprint(model: nn.Module) -> str:
    """Changes with any bit of any weight and with their order: sums of the bit patterns, each times a factor of its place.

    The factors are random, so that rearrangements do not cancel out, and odd, so that no changed bit is lost modulo 2^64.
    Integer sums are exact, so neither the device nor the number of threads matters (a float sum would move with both).
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator, device="cpu") | 1  # int64 [_CHUNK]
    entries = []
    for name, tensor in model.state_dict().items():
        bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
        factors = factors.to(bits.device)
        sums = [(part * factors[: len(part)]).sum() for part in bits.split(_CHUNK)]
        entries.append([name, str(tensor.dtype), list(tensor.shape), torch.stack(sums).tolist()])
    return digest(entries)


def _without_labels(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _without_labels(value) for key, value in config.items() if key not in _LABELS}


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        return digest([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # these two only record how the tokenizer was last called
    return digest({k: v for k, v in state.items() if k not in ("padding", "truncation")})


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # run from a source tree
        return "source"
