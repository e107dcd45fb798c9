"""mof.data turns records into batches.

`record_files` and `rows` read raw records, `forms` and `records` parse them, `templates` renders the conversations, `answer_tokens`
finds the answers, and `collator` pads. `vig` imports only this part of `mof`. It knows no model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
