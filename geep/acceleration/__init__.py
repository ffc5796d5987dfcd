"""Any fine-tuned classifier, faster and otherwise as it is: exits are learned of texts without labels.

The room refuses to know files of rows and the command line. Read `record.py` (what comes of it), `accelerating.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
