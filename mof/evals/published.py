"""Published figures that results are shown beside (arXiv 2401.06209)."""

from __future__ import annotations

# MMVP-VLM, in the order of the paper: Orientation and Direction, Presence of Specific Features, State and Condition, Quantity and
# Count, Positional and Relational Context, Color and Appearance, Structural Characteristics, Texts, Viewpoint and Perspective.
MMVP_VLM_TYPES = (
    "Orientation", "Presence", "State", "Quantity", "Spatial", "Color", "Structural Character", "Text", "Camera Perspective",
)  # fmt: skip
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
"""Right pairs in %, by type. The average is the mean, since every type has 15 pairs."""
MMVP_VLM_PAIRS = 15
"""Pairs of each type."""

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
