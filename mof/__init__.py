"""Mixture of features: several frozen encoders side by side in front of any causal language model."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from mof.adapter import AdditiveMoF, ConcatMoF, InterleavedMoF
from mof.config import MoFConfig
from mof.evals.mmvp_vlm import probe_mmvp_vlm
from mof.model import MoFForConditionalGeneration
from mof.pairs.blind_pair_search import blind_pairs
from mof.processor import MoFImageProcessor, MoFProcessor

__all__ = [
    "AdditiveMoF",
    "ConcatMoF",
    "InterleavedMoF",
    "MoFConfig",
    "MoFForConditionalGeneration",
    "MoFProcessor",
    "blind_pairs",
    "probe_mmvp_vlm",
]

AutoConfig.register(MoFConfig.model_type, MoFConfig)
AutoModelForImageTextToText.register(MoFConfig, MoFForConditionalGeneration)
AutoImageProcessor.register(MoFConfig, image_processor_classes=dict.fromkeys(("torchvision", "pil"), MoFImageProcessor))
AutoProcessor.register(MoFConfig, MoFProcessor)
