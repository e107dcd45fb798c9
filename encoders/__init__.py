"""encoders builds image encoders, which turn pixels into patch tokens on a known grid. It imports none of our other packages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
