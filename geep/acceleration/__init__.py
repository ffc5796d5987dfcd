"""Exits for a full model that stays as it is: for one that is fine-tuned first, and for any classifier of others.

The room refuses to know files of rows and the command line. Read `fitting.py`, then `training.py` (rows with labels),
`record.py` (what comes of accelerating), `looking.py`, `accelerating.py` (texts without labels).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
