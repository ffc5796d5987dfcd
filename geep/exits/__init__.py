"""When an exit is certain enough: arithmetic on logits that were computed elsewhere.

The room refuses to know batches, tokens, backends and promises. Read `criteria.py`, `profile.py`, `fitting.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
