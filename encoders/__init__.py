"""Image encoders behind one contract: pixels in, patch tokens on a known grid out. Imports none of our packages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
