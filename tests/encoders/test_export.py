"""Encoders as graphs for other runtimes: torch.export, and ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from encoders import Encoder, build_encoder


class Tokens(nn.Module):
    """A graph returns tensors only, and the grid of an encoder is two numbers."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels).tokens


@pytest.mark.slow
@torch.no_grad()
def test_torch_export() -> None:
    encoder = build_encoder("mini-clip")  # it is left before its last block, which a trace cannot follow
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    program = torch.export.export(Tokens(encoder), (pixels,))
    torch.testing.assert_close(program.module()(pixels), encoder(pixels).tokens)


@pytest.mark.slow
@torch.no_grad()
def test_onnx(tmp_path: Path) -> None:
    """As the README says."""
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    encoder = build_encoder("mini-clip")
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    torch.onnx.export(Tokens(encoder), (pixels,), tmp_path / "clip.onnx", dynamo=True)
    model = onnx.load(tmp_path / "clip.onnx")
    (tokens,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: pixels.numpy()})
    last = len(encoder.blocks_and_norm()[0]) - 1  # it has no effect on the tokens
    weights = [weight.name for weight in model.graph.initializer]
    assert any(f"blocks.{last - 1}." in name for name in weights) and not any(f"blocks.{last}." in name for name in weights)
    np.testing.assert_allclose(tokens, encoder(pixels).tokens.numpy(), atol=1e-3)
