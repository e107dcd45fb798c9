"""Registers our classes with the Auto classes of transformers. `from mof import MoFForConditionalGeneration` does it, too."""

from __future__ import annotations

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from mof.config import MoFConfig
from mof.model import MoFForConditionalGeneration
from mof.processor import MoFImageProcessor, MoFProcessor


def register_auto_classes() -> None:
    """Make AutoConfig, AutoModelForImageTextToText, AutoImageProcessor and AutoProcessor open the models of this package."""
    AutoConfig.register(MoFConfig.model_type, MoFConfig, exist_ok=True)
    AutoModelForImageTextToText.register(MoFConfig, MoFForConditionalGeneration, exist_ok=True)
    image_processors = dict.fromkeys(("torchvision", "pil"), MoFImageProcessor)
    AutoImageProcessor.register(MoFConfig, image_processor_classes=image_processors, exist_ok=True)
    AutoProcessor.register(MoFConfig, MoFProcessor, exist_ok=True)


register_auto_classes()
