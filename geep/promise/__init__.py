"""Promises and their exact bounds: counts in, bounds out.

A risk is a value: a row of `RISKS` says what is observed and what bounds it. The room refuses to know exits, engines
and tensors. Read `bounds.py` (`PairedCounts`, `RISKS`), `promises.py`, `walking.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
