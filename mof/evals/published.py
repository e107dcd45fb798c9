"""Results are compared with these figures of the MMVP paper (arXiv 2401.06209), the VIG paper (arXiv 2602.17186) and repaired CLIPs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
REPAIRED_SOURCE = "GenHancer (arXiv 2503.19480, table 1)"
MMVP_VLM_REPAIRED: dict[str, tuple[float, ...]] = {
    "OpenAI ViT-L/14 224 + DIVA": (13.3, 20.0, 40.0, 6.7, 20.0, 53.3, 46.7, 20.0, 13.3),
    "OpenAI ViT-L/14 224 + GenHancer": (13.3, 33.3, 33.3, 20.0, 6.7, 73.3, 46.7, 20.0, 40.0),
    "OpenAI ViT-L/14 336 + DIVA": (26.7, 20.0, 33.3, 13.3, 13.3, 46.7, 26.7, 6.7, 40.0),
    "OpenAI ViT-L/14 336 + GenHancer": (6.7, 20.0, 33.3, 20.0, 6.7, 73.3, 53.3, 26.7, 26.7),
    "MetaCLIP ViT-L/14 224 + DIVA": (6.7, 6.7, 60.0, 0.0, 26.7, 66.7, 20.0, 20.0, 40.0),
    "MetaCLIP ViT-L/14 224 + GenHancer": (13.3, 20.0, 53.3, 13.3, 26.7, 80.0, 33.3, 13.3, 33.3),
    "MetaCLIP ViT-H/14 224 + DIVA": (13.3, 20.0, 53.3, 33.3, 13.3, 66.7, 33.3, 13.3, 40.0),
    "MetaCLIP ViT-H/14 224 + GenHancer": (20.0, 20.0, 66.7, 26.7, 26.7, 66.7, 33.3, 20.0, 53.3),
    "SigLIP SO400M 224 + DIVA": (13.3, 26.7, 60.0, 46.7, 13.3, 73.3, 53.3, 26.7, 53.3),
    "SigLIP SO400M 224 + GenHancer": (20.0, 20.0, 66.7, 60.0, 20.0, 86.7, 40.0, 13.3, 53.3),  # the table prints 13.0 for texts
    "SigLIP SO400M 384 + DIVA": (26.7, 33.3, 53.3, 26.7, 13.3, 80.0, 40.0, 26.7, 46.7),
    "SigLIP SO400M 384 + GenHancer": (26.7, 20.0, 66.7, 33.3, 13.3, 86.7, 40.0, 26.7, 46.7),
}
"""Right pairs in %, of CLIPs that were trained further for details. The rows of DIVA (arXiv 2407.20171) are in GenHancer's table, too."""
MMVP_VLM_PAIRS = 15
"""Pairs of each type."""


def mmvp_vlm_average(shares: Sequence[float]) -> float:
    """Return a row's average in %, computed from counts of pairs: the mean of the rounded shares may be 0.1 off."""
    return 100 * sum(round(share / 100 * MMVP_VLM_PAIRS) for share in shares) / (MMVP_VLM_PAIRS * len(shares))


# MMVP, right pairs in %.
MMVP: dict[str, float] = {
    "human": 95.7,
    "Gemini": 40.7,
    "GPT-4V": 38.7,
    "LLaVA-1.5 + I-MoF, 336 px": 31.3,
    "LLaVA-1.5 + I-MoF, 224 px": 28.0,
    "chance": 25.0,
    "LLaVA-1.5": 24.7,
    "Bard": 19.0,
    "Bing": 17.3,
    "InstructBLIP": 16.7,
    "LLaVA + I-MoF, 224 px": 16.7,
    "MiniGPT-4": 12.7,
    "LLaVA": 6.0,
}

# Pearson's r between a model's right pairs by pattern on MMVP and CLIP's on MMVP-VLM. The models' figures by pattern are
# published only as a drawing.
MMVP_CORRELATION: dict[str, float] = {
    "LLaVA-1.5": 0.87,
    "InstructBLIP": 0.71,
    "Bard": 0.79,
    "Gemini": 0.72,
    "GPT-4V": 0.31,
}

# Figures of the VIG paper's second version, by the keys of `mof.evals.outcomes.MEASURES`. CHAIR's are by the rules of the released script.
_VIG_COLUMNS = (
    "llava_in_the_wild gpt_eval_llava_all", "mmvet gpt_eval_score", "cv_bench cv_bench_acc", "pope f1", "chair s", "mmhal_bench mmhal_rate",
)  # fmt: skip
_VIG = {
    "LLaVA-1.5-7B": (59.02, 28.62, 59.18, 87.08, 52.93, 71.25),
    "LLaVA-1.5-7B + VIG": (61.22, 32.71, 62.48, 87.47, 47.00, 62.78),
    "LLaVA-1.5-13B": (72.01, 36.19, 60.16, 87.05, 51.96, 67.09),
    "LLaVA-1.5-13B + VIG": (73.45, 36.87, 62.89, 87.53, 48.19, 63.11),
}


def published_rows(keys: Collection[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Return source -> model -> key of `mof.evals.outcomes.MEASURES` -> figure, for the given keys."""
    rows: dict[str, dict[str, dict[str, float]]] = {
        "Eyes Wide Shut? (arXiv 2401.06209)": {
            **{name: {"mmvp-vlm pairs": mmvp_vlm_average(shares)} for name, shares in MMVP_VLM.items()},
            **{name: {"mmvp pairs": share} for name, share in MMVP.items()},
        },
        REPAIRED_SOURCE: {name: {"mmvp-vlm pairs": mmvp_vlm_average(shares)} for name, shares in MMVP_VLM_REPAIRED.items()},
        "VIG (arXiv 2602.17186, version 2)": {name: dict(zip(_VIG_COLUMNS, values, strict=True)) for name, values in _VIG.items()},
    }
    wanted = {
        source: {name: figures for name, row in models.items() if (figures := {key: row[key] for key in row if key in keys})}
        for source, models in rows.items()
    }
    return {source: models for source, models in wanted.items() if models}
