"""Makes the Auto classes of transformers open our models: each class is registered by its module, and this module imports all of them.

`from mof import MoFForConditionalGeneration` (or MoFConfig, MoFProcessor) imports it. `import mof` alone does not: that would load
torch and transformers, for seconds. A program that only opens a folder by an Auto class calls `mof.register_auto_classes()` first.
"""

from __future__ import annotations

from mof.base_model import MoFModel
from mof.config import MoFConfig
from mof.model import MoFForConditionalGeneration
from mof.processor import MoFImageProcessor, MoFProcessor

__all__ = ["MoFConfig", "MoFForConditionalGeneration", "MoFImageProcessor", "MoFModel", "MoFProcessor", "register_auto_classes"]


def register_auto_classes() -> None:
    """Make transformers' Auto classes of configs, processors and models (base, image-text-to-text, multimodal) open our folders.

    The import of this module has done it already. Call this function to say so in the code.
    """
