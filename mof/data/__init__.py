"""From a raw record to a batch: `rows` reads them, `records` parses one, `answer_tokens` finds its answers, `collator` pads.

The one part of `mof` that `vig` imports; it knows no model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
