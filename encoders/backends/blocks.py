"""This module reads the blocks and resamples the position tables of vision transformers, which are alike in all libraries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from encoders.base import Encoder

Grid = tuple[int, int]

# Shapes: B = images, L = patch and prefix tokens, D = width.


KEPT = "kept_in_trace"
"""Entry in the `__dict__` of a block: where the hooks of `watch` put the block's input and output while a pass is traced."""


class _Reached(Exception):
    """_Reached ends a forward pass early."""


def watch(blocks: nn.ModuleList, layers: Iterable[int]) -> None:
    """Install the hooks that `traced_outputs` needs on the blocks of these layers. torch.compile cannot trace the installation."""
    for layer in layers:
        if layer:
            blocks[layer - 1].register_forward_hook(_keep_output)
        else:
            blocks[0].register_forward_pre_hook(_keep_input)


def _keep_output(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    if (kept := block.__dict__.get(KEPT)) is not None:
        kept["output"] = _tokens_of(output)


def _tokens_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the tokens of a block's output, beside which V-JEPA 2 returns its attention."""
    return output[0] if isinstance(output, tuple) else output


def _keep_input(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if (kept := block.__dict__.get(KEPT)) is not None:
        kept["input"] = inputs[0]


def traced_outputs(blocks: nn.ModuleList, layers: Iterable[int], run: Callable[[], object]) -> dict[int, Tensor]:
    """Return the outputs [B, L, D] of layers, as `block_outputs` does, in a pass that torch.compile or torch.export traces.

    The whole tower runs in the trace, and the blocks after the last layer drop out of the graph.
    """
    read = {layer: blocks[max(layer - 1, 0)] for layer in layers}
    for block in read.values():
        block.__dict__[KEPT] = {}
    run()
    outputs = {layer: block.__dict__[KEPT]["output" if layer else "input"] for layer, block in read.items()}
    for block in read.values():
        block.__dict__[KEPT] = None
    return outputs


@contextmanager
def block_outputs(blocks: nn.ModuleList, layers: Iterable[int], leave: bool = False) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs [B, L, D] of layers, counted from the front, while the tower runs in the body of the `with`.

    Layer 0 is the input of the first block. Several threads may run the same tower, and each thread gets the outputs of its own pass.

    Args:
        leave: leave the body as soon as the deepest layer is read, so that the blocks after this layer do not run.
    """
    outputs: dict[int, Tensor] = {}
    wanted, thread = set(layers), threading.get_ident()

    def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        if threading.get_ident() != thread:
            return
        outputs[layer] = _tokens_of(output)
        if leave and layer == max(wanted):
            raise _Reached

    def keeping(layer: int) -> Callable[..., None]:
        return lambda _block, inputs, *output: keep(layer, output[0] if output else inputs[0])

    hooks = [blocks[layer - 1].register_forward_hook(keeping(layer)) for layer in wanted if layer]
    if 0 in wanted:
        hooks.append(blocks[0].register_forward_pre_hook(keeping(0)))
    try:
        yield outputs
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    assert outputs.keys() == wanted, "the tower never ran the block"


class BlockEncoder(Encoder):
    """BlockEncoder is an encoder whose tower has blocks that take and return tokens [B, L, D], prefix tokens first.

    The tower runs its blocks itself, because only the tower knows their arguments (masks, rotary positions). A subclass implements
    `blocks_and_norm` and `image_embedding`, and `stage_tokens` for towers without equal blocks. At the end of its `__init__`, it calls
    `watch_blocks`.
    """

    def watch_blocks(self) -> None:
        """Prepare the blocks for torch.compile."""
        if (parts := self.blocks_and_norm()) is not None:
            watch(parts[0], set(self.layers))

    def blocks_and_norm(self) -> tuple[nn.ModuleList, nn.Module] | None:
        """Return the tower's blocks and its final norm, or None for a tower without equal blocks, which is read by `stage_tokens`."""
        raise NotImplementedError

    def stage_tokens(self, x: Tensor) -> Tensor:
        """Return the patch tokens of a tower without equal blocks: [B, 3, S, S] normalised -> [B, h*w, D]."""
        raise NotImplementedError

    def patch_tokens(self, x: Tensor) -> Tensor:
        if (parts := self.blocks_and_norm()) is None:
            return self.stage_tokens(x)  # [B, h*w, D]
        if torch.compiler.is_compiling():
            return self._patches(traced_outputs(parts[0], self.layers, lambda: self.image_embedding(x)), parts[1])  # [B, h*w, D]
        with block_outputs(parts[0], self.layers, leave=True) as outputs:  # [B, L, D] each
            self.image_embedding(x)
        return self._patches(outputs, parts[1])  # [B, h*w, D]

    def embedding_and_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if (parts := self.blocks_and_norm()) is None:
            return super().embedding_and_tokens(x)
        with block_outputs(parts[0], self.layers) as outputs:  # [B, L, D] each
            embedding = self.image_embedding(x)  # [B, E]
        return embedding, self._patches(outputs, parts[1])  # [B, h*w, D]

    def _patches(self, outputs: Mapping[int, Tensor], norm: nn.Module) -> Tensor:
        """Return the outputs [B, L, D] of `layers` side by side, without prefix tokens, as [B, h*w, D]."""
        after = norm if self.norm else nn.Identity()
        return torch.cat([after(outputs[layer])[:, self.prefix_tokens :] for layer in self.layers], dim=-1)


class Positions:
    """Positions resamples a position table for other grids, always from the loaded or trained table and never from a resampled table.

    So resizing to a and then to b gives the same encoder as resizing to b, and resizing back gives the first table again.
    """

    def __init__(self) -> None:
        self._source: tuple[Tensor, Grid] | None = None
        self._made: Tensor | None = None

    def resampled(self, table: nn.Parameter, grid: Grid, new_grid: Grid, prefix: int) -> nn.Parameter:
        """Return the table [..., L, D] for `new_grid` that replaces `table`, which is for `grid`.

        open_clip resamples in the same way as timm when it loads weights (bicubic, with antialiasing).

        Args:
            prefix: the number of positions at the beginning of the table that are not on the grid.
        """
        from timm.layers import resample_abs_pos_embed  # slow

        if self._source is None or not self._is_made(table):
            self._source = table.detach().clone(), grid
        source, source_grid = self._source
        tables = source.to(table).reshape(1, *source.shape[-2:])  # [1, L, D]
        tables = resample_abs_pos_embed(tables, list(new_grid), list(source_grid), num_prefix_tokens=prefix)  # [1, L, D]
        made = tables.reshape(*source.shape[:-2], *tables.shape[-2:]).detach()
        self._made = made.clone()
        return nn.Parameter(made, requires_grad=table.requires_grad)

    def _is_made(self, table: Tensor) -> bool:
        """Return whether `table` is still the last resampled table, so that since then no weights were loaded or trained."""
        if self._made is None or self._made.is_meta or table.is_meta or self._made.shape != table.shape:
            return False
        return torch.equal(self._made.to(table), table)
