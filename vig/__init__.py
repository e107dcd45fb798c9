"""vig measures how much the image helped each answer token, and trains on the tokens that it helped (arXiv 2602.17186)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
