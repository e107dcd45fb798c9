from .adapter import AdditiveMoF, ConcatMoF, CrossAttentionMoF, GatedMoF, InterleavedMoF, SequenceMoF
from .auto_classes import MoFConfig, MoFForConditionalGeneration, MoFModel, MoFProcessor, register_auto_classes
from .evals.mmvp_vlm import probe_mmvp_vlm
from .pairs.search import blind_pairs

__all__ = [
    "AdditiveMoF",
    "ConcatMoF",
    "CrossAttentionMoF",
    "GatedMoF",
    "InterleavedMoF",
    "MoFConfig",
    "MoFForConditionalGeneration",
    "MoFModel",
    "MoFProcessor",
    "SequenceMoF",
    "blind_pairs",
    "probe_mmvp_vlm",
    "register_auto_classes",
]

__version__: str
