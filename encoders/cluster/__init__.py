"""encoders.cluster does independent items of work in this process, or by actors (processes) on the machines of a Ray cluster."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
