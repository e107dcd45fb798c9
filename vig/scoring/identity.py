"""Two scoring runs are the same run if model, processor, null image, length, seed and versions are equal.

Large parts are compared by their digests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from encoders.runs import versions
from encoders.store.fingerprints import weights_digest
from mof.data.digests import digest
from vig.scoring.score_table import IMAGE_COLUMNS

# Entries of a config that saving, loading or training fill in. No forward pass depends on them.
_LABELS = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"}
_LABELS |= {"bos_token_id", "eos_token_id", "pad_token_id"}


def scoring_identity(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    null: Mapping[str, Any],
    max_length: int,
    seed: int,
    measures: Sequence[str] = (),
    encoders: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the part of the manifest that must be equal when a run is resumed (JSON-able)."""
    return {
        "model": type(model).__name__,
        "config": digest(_without_labels(model.config.to_dict())),
        "weights": weights_digest(model),
        **processor_identity(processor),
        "null": dict(null),
        "max_length": max_length,
        "seed": seed,
        "image_columns": list(IMAGE_COLUMNS),  # a folder without them is of earlier releases
        # without them, the identity is the same as in earlier releases
        **({"measures": list(measures)} if measures else {}),
        **({"encoders": list(encoders)} if encoders else {}),
        "versions": versions("mof-vig", "torch", "transformers"),
    }


def processor_identity(processor: ProcessorMixin) -> dict[str, str]:
    """Return the digests of everything that turns a record into tokens."""
    tokenizer = processor.tokenizer
    return {
        "processor": digest(processor.to_dict()),
        "tokenizer": _tokenizer_digest(tokenizer),
        "chat_template": digest(processor.chat_template or tokenizer.chat_template),
    }


def _without_labels(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _without_labels(value) for key, value in config.items() if key not in _LABELS}


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        return digest([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # these two only record the last call of the tokenizer
    return digest({k: v for k, v in state.items() if k not in ("padding", "truncation")})
