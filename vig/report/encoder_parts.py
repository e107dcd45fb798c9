"""encoder_parts splits the help of an image to the tokens of an answer among the encoders of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from vig.scoring.encoder_branches import FUSED, PIXELS

# Shapes: P tokens of the prompt, N tokens of the answer, M images, S side of the pixels, T tokens of an image, D width of the language
# model, V the vocabulary.


@torch.no_grad()
def encoder_parts(
    model: PreTrainedModel, inputs: Mapping[str, Any], null_inputs: Mapping[str, Any], answer: Tensor, losses: Tensor
) -> dict[str, list[float]]:
    """Return encoder -> how much the image helps each token through this encoder alone, in nats.

    That is the token's loss when this encoder sees the null images and the others see the images, minus its loss with the images. It is
    `vig.score(..., per_encoder=True)` for an answer of the model itself.

    Args:
        inputs, null_inputs: the model's inputs for the prompt [1, P], with images and with null images.
        answer: the ids [N] of the answer's tokens.
        losses: their losses [N] with the images.

    Returns:
        {} for a model that is no mixture of several encoders, and for null inputs without images of the same shape.
    """
    mixer: Any = getattr(model, "mixer", None)
    pixels, nulls = inputs.get(PIXELS), null_inputs.get(PIXELS)  # [M, 3, S, S] each
    if mixer is None or len(mixer.encoders) < 2 or pixels is None or nulls is None or pixels.shape != nulls.shape:
        return {}
    ids = torch.cat([inputs["input_ids"], answer[None].to(model.device)], dim=1)  # [1, P + N]
    clean, null = mixer.encode(pixels), mixer.encode(nulls)
    parts = {}
    for name in mixer.encoders:
        fused = mixer.fuse({**clean, name: null[name]})  # [M, T, D]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **{FUSED: fused}).logits[0, -len(answer) - 1 : -1]  # [N, V]
        blind = F.cross_entropy(logits.float(), answer.to(logits.device), reduction="none")  # [N]
        parts[name] = (blind.cpu() - losses.cpu()).tolist()
    return parts
