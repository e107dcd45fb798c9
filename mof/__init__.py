"""mof puts a mixture of features before a language model: several frozen encoders stand side by side before any causal language model.

`import mof` alone loads nothing. The first use of a name that needs torch loads it. The Auto classes of transformers open our
models after `from mof import MoFForConditionalGeneration` (or MoFConfig, MoFProcessor), or after `mof.register_auto_classes()`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
