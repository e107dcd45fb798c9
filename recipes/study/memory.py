"""This module estimates the memory that mixed-precision training with AdamW takes, in bytes per GPU:

    weights      trainable: 4 a parameter, the fp32 master. Frozen: 2, kept in bf16; 0.516 for matrices in 4 bits.
    gradients    trainable: 4.
    optimizer    trainable: 8, AdamW's two fp32 moments.
    gathered     the bf16 weights that are whole on each GPU at a time. Sharded: two decoder layers (the layer at work, and the
                 next layer, prefetched) and both embeddings. Plain data parallel: autocast's bf16 copies of all trainable weights; in 4 bits
                 also the largest matrix, which is whole while it is multiplied.
    activations  see `Layer` and `study.plan.Plan.activations`.

Sharding (FSDP2, ZeRO-3) divides the first three by the number of GPUs. Only the small frozen encoders are whole on every GPU.
ZeRO-3 keeps the same 16 bytes differently: 2 + 2 in bf16 and 12 in fp32. Without `bf16` every number takes 4 bytes.
Not counted: the CUDA context, fragmentation, and the temporary tensors of the frozen encoders; a tenth of the GPU is left for them.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
FOUR_BITS = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a parameter in 4 bits: a scale of 8 bits for 64 parameters, and a scale of 32 bits for 256 scales (QLoRA, arXiv 2305.14314)."""
GPU = 80
"""Memory of a GPU in GiB, by default. The estimate may fill nine tenths of it."""


@dataclass(frozen=True)
class Layer:
    """Layer holds the widths of a decoder layer of the Llama kind: RMSNorm, attention without a stored score matrix, gated MLP."""

    hidden: int
    queries: int
    keys: int
    mlp: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Return the (inputs, outputs) of the seven matrices."""
        attention = [(self.hidden, self.queries), *[(self.hidden, self.keys)] * 2, (self.queries, self.hidden)]
        return [*attention, *[(self.hidden, self.mlp)] * 2, (self.mlp, self.hidden)]

    def saved(self, trainable: bool, width: int, rank: int = 0) -> int:
        """Return the bytes that a token keeps for the backward pass, at `width` bytes per number. The norms work in fp32.

        A norm keeps its fp32 input. A trainable norm also keeps the normalised input (for its weight) and its output (for the linear
        layers after it); with LoRA of this rank, its output and the middle of LoRA, but not the normalised input. Attention keeps
        queries, keys, values and its output for its own backward pass. The MLP keeps gate, up and the activated gate; a trainable MLP
        also keeps their product (for the linear layer after it).
        """
        norm = self.hidden * (4 + width * ((1 if rank else 2) if trainable else 0))
        attention = 2 * width * (self.queries + self.keys)
        mlp = width * self.mlp * (3 + trainable)
        return 2 * norm + attention + mlp + width * rank * len(self.matrices)
