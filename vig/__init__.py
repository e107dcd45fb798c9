"""VIG: how much the image helped each answer token, and training that spends its loss there (arXiv 2602.17186)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
