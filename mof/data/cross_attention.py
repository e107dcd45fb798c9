"""Llama 3.2 Vision is mended here: the images of other records in a batch change nothing for a record.

In its cross-attention layers, transformers lets a token that sees no image attend evenly to all images of the batch's longest list of
images. The weights were trained without: the attention adds nothing there. Alone, a record without an image skips these layers.
So it skips them here in any batch. A token before the images of its record attends evenly to these images only, as it does alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

# Shapes: R records of a batch, T tokens of a record, M images of the record with the most, C tiles of an image, V vectors of a tile,
# D the width of the language model.


@cache
def keep_to_own_images() -> None:
    """Mend the classes of transformers, for all models of this process. Results of a record alone stay as they are."""
    from transformers.models.mllama import modeling_mllama as mllama  # slow, and needed for one family of models

    layer: Any = mllama.MllamaCrossAttentionDecoderLayer
    prepare, call = mllama._prepare_cross_attention_mask, layer.__call__

    def own_images_mask(cross_attention_mask: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        bias, sees = prepare(cross_attention_mask, *args, **options)  # [R, 1, T, M * C * V], [R, 1, T, 1]: 0 for a token without images
        own = cross_attention_mask.bool().any(dim=3).any(dim=1)  # [R, M]
        others = ~own.repeat_interleave(bias.shape[3] // own.shape[1], dim=1)[:, None, None]  # [R, 1, 1, M * C * V]
        return bias.masked_fill(others & (sees == 0), torch.finfo(bias.dtype).min), sees

    def skip_without_images(self: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        after = call(self, hidden_states, *args, **options)  # [R, T, D]
        sees = options.get("full_text_row_masked_out_mask")  # [R, 1, T, 1], or None if the model got no mask
        if sees is None:
            return after
        has_image = sees[:, 0].to(after.device).bool().any(dim=1, keepdim=True)  # [R, 1, 1]
        return torch.where(has_image, after, hidden_states.to(after.device))

    mllama._prepare_cross_attention_mask = own_images_mask
    layer.__call__ = skip_without_images  # not forward, which accelerate replaces in models on several devices
