"""The way of a record to a batch: `rows` reads raw records, `forms` and `records` parse them, `templates` renders, `answer_tokens`
finds answers, `collator` pads.

`vig` imports only this part of `mof`. It knows no model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
