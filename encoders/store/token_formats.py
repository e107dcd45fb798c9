"""Patch tokens are kept on disk as float16, bfloat16, or int8 with one scale per token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Shapes: B = images, T = patch tokens of each, D = their width.

TokenFormat = Literal["float16", "bfloat16", "int8"]
TOKEN_FORMATS: tuple[TokenFormat, ...] = ("float16", "bfloat16", "int8")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def pack(tokens: Tensor, form: TokenFormat) -> dict[str, Tensor]:
    """tokens [B, T, D] -> "tokens" [B, T, D] in `form`; for int8 also "scales" and "errors" [B, T], float32.

    int8 is round(token / scale) with scale = its largest magnitude / 127, so no value moves by more than half a scale. The error
    is measured per token: |what `unpack` gives - token| / |token|, in Euclidean norm.
    """
    if form != "int8":
        return {"tokens": tokens.to(DTYPES[form])}
    tokens = tokens.float()
    scales = tokens.abs().amax(dim=-1) / 127  # [B, T]
    rounded = torch.where(scales[..., None] > 0, tokens / scales[..., None], 0).round()  # [B, T, D]
    packed = rounded.clamp(-127, 127).to(torch.int8)
    lengths = tokens.norm(dim=-1)  # [B, T]
    errors = (unpack(packed, scales) - tokens).norm(dim=-1) / lengths.clamp_min(torch.finfo(torch.float32).tiny)  # [B, T]
    return {"tokens": packed, "scales": scales, "errors": errors}


def unpack(tokens: Tensor, scales: Tensor | None) -> Tensor:
    """Return packed tokens [..., D], with scales [...] for int8, as [..., D]: float32 for int8, else as stored."""
    return tokens if scales is None else tokens.float() * scales[..., None]
