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


@torch.no_grad()
def test_the_graph_leaves_out_blocks_that_do_not_run() -> None:
    encoder = build_encoder("mini-clip")
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    program = torch.export.export(Tokens(encoder), (pixels,))
    torch.testing.assert_close(program.module()(pixels), encoder(pixels).tokens)
    names = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    last = len(encoder.blocks_and_norm()[0]) - 1  # mini-clip is read before its last block
    assert any(f"blocks_{last - 1}_" in name for name in names) and not any(f"blocks_{last}_" in name for name in names)


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
    np.testing.assert_allclose(tokens, encoder(pixels).tokens.numpy(), atol=1e-3)
