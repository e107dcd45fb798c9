"""Published figures that results are shown beside (arXiv 2401.06209)."""

from __future__ import annotations

from collections.abc import Sequence

MMVP_VLM: dict[str, tuple[float, ...]] = {
    "OpenAI ViT-L/14 224": (13.3, 13.3, 20.0, 20.0, 13.3, 53.3, 20.0, 6.7, 13.3),
    "OpenAI ViT-L/14 336": (0.0, 20.0, 40.0, 20.0, 6.7, 20.0, 33.3, 6.7, 33.3),
    "SigLIP SO400M 224": (26.7, 20.0, 53.3, 40.0, 20.0, 66.7, 40.0, 20.0, 53.3),
    "SigLIP SO400M 384": (20.0, 26.7, 60.0, 33.3, 13.3, 66.7, 33.3, 26.7, 53.3),
    "DFN ViT-H/14 224": (20.0, 26.7, 73.3, 26.7, 26.7, 66.7, 46.7, 13.3, 53.3),
    "DFN ViT-H/14 378": (13.3, 20.0, 53.3, 33.3, 26.7, 66.7, 40.0, 20.0, 40.0),
    "MetaCLIP ViT-L/14 224": (13.3, 6.7, 66.7, 6.7, 33.3, 46.7, 20.0, 6.7, 13.3),
    "MetaCLIP ViT-H/14 224": (6.7, 13.3, 60.0, 13.3, 6.7, 53.3, 26.7, 13.3, 33.3),
    "EVA01 ViT-g/14 224": (6.7, 26.7, 40.0, 6.7, 13.3, 66.7, 13.3, 13.3, 20.0),
    "EVA02 ViT-bigE/14+ 224": (13.3, 20.0, 66.7, 26.7, 26.7, 66.7, 26.7, 20.0, 33.3),
}
"""Right pairs in %, by the patterns of `mof.evals.patterns`. The average is the mean, since every type has 15 pairs."""
MMVP_VLM_PAIRS = 15
"""Pairs of each type."""


def mmvp_vlm_average(shares: Sequence[float]) -> float:
    """A row's average in %, from counts of pairs: the mean of the rounded shares may be 0.1 off."""
    return 100 * sum(round(share / 100 * MMVP_VLM_PAIRS) for share in shares) / (MMVP_VLM_PAIRS * len(shares))


# MMVP, right pairs in %.
MMVP: dict[str, float] = {
    "human": 95.7,
    "Gemini": 40.7,
    "GPT-4V": 38.7,
    "chance": 25.0,
    "LLaVA-1.5": 24.7,
    "Bard": 19.0,
    "Bing": 17.3,
    "InstructBLIP": 16.7,
    "MiniGPT-4": 12.7,
    "LLaVA": 6.0,
}

# Pearson's r between a model's right pairs by pattern on MMVP and those of its CLIP on MMVP-VLM. The models' figures by pattern are
# published only as a drawing.
MMVP_CORRELATION: dict[str, float] = {
    "LLaVA-1.5": 0.87,
    "InstructBLIP": 0.71,
    "Bard": 0.79,
    "Gemini": 0.72,
    "GPT-4V": 0.31,
}
