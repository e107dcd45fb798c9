"""Mixture of features: several frozen encoders side by side in front of any causal language model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
