"""With the null "attention", the second pass has the image's tokens, but no token attends to them. Not every model obeys a mask."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mof.data.answer_tokens import Example
from vig.scoring.answer_losses import AnswerLosses

LARGEST_TRACE = 1e-3
"""Nats by which a loss may depend on hidden pixels: rounding in float32. In half precision, it is the mean that may be 0.05."""


class CannotHideError(ValueError):
    """A CannotHideError says that the model sees images though its attention mask hides them."""


def image_token_of(model: PreTrainedModel) -> int:
    """Return the id of the tokens that stand for an image in the model's input. ValueError for a model without them."""
    token = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
    if token is None:
        raise ValueError(f"null='attention' hides image tokens, but the config of {type(model).__name__} names none; take 'drop' or 'blur'")
    return int(token)


def refuse_seeing(losses: AnswerLosses, example: Example) -> None:
    """Raise a CannotHideError if a loss of the example, whose image tokens are hidden, depends on the pixels.

    This is the case in models that attend to images from the side (Llama 3.2 Vision), and in models with recurrent layers, which no mask
    reaches.
    """
    other = replace(example, images={name: _others(name, value) for name, value in example.images.items()})
    difference = (losses([[example]], 0) - losses([[other]], 0)).abs()  # [A] or [A, M]
    difference = difference.flatten(1)[:, 0] if difference.dim() > 1 else difference  # [A]
    exact = losses.model.dtype in (torch.float32, torch.float64)
    trace = float(difference.max() if exact else difference.mean())
    if trace > (LARGEST_TRACE if exact else 5e-2):
        raise CannotHideError(
            f"null='attention' does not work with {type(losses.model).__name__}: its losses depend on the image by {trace:.1g} nats though "
            "the attention mask hides the image; take 'drop' or 'blur'"
        )


def _others(name: str, value: Tensor) -> Tensor:
    """Return other pixels or features in the same number; masks and sizes stay as they are."""
    if value.dtype == torch.uint8:
        return 255 - value
    return 1 - value if value.is_floating_point() and "mask" not in name else value
