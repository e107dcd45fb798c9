"""Some language models have a table of positions and fail behind its end. Longer records are cut there, in scoring and in training."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def most_tokens(config: Any, max_length: int) -> int:
    """Return `max_length`, or the number of positions that a model with this config has, if that is smaller.

    Models with rotary embeddings (Llama, Qwen) have no such end, and others (Bloom, Mamba) name none.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None):  # the second in configs of remote code
        return max_length
    places = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not places or places >= max_length:
        return max_length
    logger.warning("the language model has %d positions, so longer records are cut there, and not at %d tokens", places, max_length)
    return int(places)
