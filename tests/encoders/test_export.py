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
def test_export_leaves_out_the_blocks_that_do_not_run() -> None:
    encoder = build_encoder("mini-clip", layer=1)
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    program = torch.export.export(Tokens(encoder), (pixels,))
    torch.testing.assert_close(program.module()(pixels), encoder(pixels).tokens)
    kept = [name for name in program.run_decompositions().state_dict if ".blocks.1." in name]
    used = {node.target for node in program.graph.nodes if node.op == "placeholder" and node.users}
    assert kept and not any("blocks_1_" in str(name) for name in used)


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
