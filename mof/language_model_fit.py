"""refuse_unfit tries whether a language model works behind a mixer, because its configuration does not say this.

A few language models treat padding on the left as text, drop their state between two calls, or use the ids of tokens for more than the
embeddings. With these models, generation or batches would be wrong without an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mof.generation import CACHE_NAMES

if TYPE_CHECKING:
    from mof.model import MoFForConditionalGeneration

# Shapes: L tokens of the text, V the vocabulary.

LENGTH, PADDING = 8, 3  # number of tokens of the text that is tried, and of the padding before the text
MOST_APART = {torch.float32: 1e-3, torch.float64: 1e-3}  # largest difference of logits, as a share of the largest logit
MOST_APART_ROUNDED = 0.1  # in 16 bits, or with quantized layers


@torch.no_grad()
def refuse_unfit(model: MoFForConditionalGeneration) -> None:
    """Compare the model with its bare language model on a few tokens: from embeddings, with padding on the left, and with a cache.

    Weights on the meta device are not tried.

    Raises:
        ValueError: if the logits differ or the model fails; the message names the language model and the fault.
    """
    llm = model.language_model
    if llm.device.type == "meta":
        return
    name, modes = type(llm).__name__, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        reasons = _misfits(model)
    except Exception as error:  # models raise errors of any kind
        raise ValueError(
            f"{name} cannot be the language model of a MoF: it fails on a few tokens ({type(error).__name__}: {error})"
        ) from error
    finally:
        for module, was_training in modes:
            module.training = was_training
    if reasons:
        raise ValueError(f"{name} cannot be the language model of a MoF: {'; '.join(reasons)}")


def _misfits(model: MoFForConditionalGeneration) -> list[str]:
    """Return a message for each way in which the model gives other logits than its language model."""
    llm = model.language_model
    rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    ids = torch.arange(rows, device=llm.device)
    ids = ids[(ids != model.config.image_token_id) & (ids != model.generation_config.pad_token_id)]  # [usable tokens]
    ids = ids[torch.linspace(0, len(ids) - 1, LENGTH).long()][None]  # [1, L]
    plain = llm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]  # [L, V]
    longer = torch.cat([ids.flip(1), ids[:, :PADDING]], dim=1)  # [1, L + PADDING]
    padded = torch.cat([torch.cat([ids[:, :PADDING], ids], dim=1), longer])  # [2, L + PADDING]
    mask = torch.ones_like(padded)
    mask[0, :PADDING] = 0
    reasons = []
    limit = MOST_APART_ROUNDED if getattr(llm, "hf_quantizer", None) else MOST_APART.get(llm.dtype, MOST_APART_ROUNDED)

    def compare(logits: Tensor, expected: Tensor, reason: str) -> None:
        apart = (logits.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30)
        if not apart <= limit:  # true for NaN too
            reasons.append(f"{reason} (logits differ by {float(apart):.2g} of their largest value)")

    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]  # [L, V]
    compare(alone, plain, "it makes more of tokens than of their embeddings")
    compare(model(input_ids=padded, attention_mask=mask).logits[0, PADDING:], alone, "padding on the left changes its answers")
    if not reasons and model.cache_name:
        start = model(input_ids=padded[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        cache = next(start[name] for name in CACHE_NAMES if name in start)  # outputs name it in another way than the model may
        step = model(input_ids=padded[:, -1:], attention_mask=mask, use_cache=True, cache=cache)
        compare(step.logits[0, -1:], alone[-1:], "it does not go on from its cache")
    return reasons
