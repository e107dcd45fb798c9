"""There are three kinds of `mof.evals.answering.Answerer`: a model in this process, an endpoint on the network, and a file of answers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
