"""This module makes transformers' Auto classes open our models: each class is registered by its module, and all are imported here.

`from mof import MoFForConditionalGeneration` (or MoFConfig, MoFProcessor) imports this module. `import mof` alone does not, because it
would take seconds to load torch and transformers. A program that only opens a folder by an Auto class calls
`mof.register_auto_classes()` first.
"""

from __future__ import annotations

from mof.base_model import MoFModel
from mof.config import MoFConfig
from mof.image_processor import MoFImageProcessor
from mof.model import MoFForConditionalGeneration
from mof.processor import MoFProcessor

__all__ = ["MoFConfig", "MoFForConditionalGeneration", "MoFImageProcessor", "MoFModel", "MoFProcessor", "register_auto_classes"]


def register_auto_classes() -> None:
    """Make transformers' Auto classes of configs, processors and models (base, image-text-to-text, multimodal) open our folders.

    The import of this module has already done this. A call makes it visible in the code.
    """
