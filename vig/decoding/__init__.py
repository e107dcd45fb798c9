"""vig.decoding makes decoding look at the image, by contrasts with a null image or edited attention, for any image-text-to-text model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
