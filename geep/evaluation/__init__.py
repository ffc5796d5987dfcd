"""The engine beside its honest rivals.

The room refuses to know files of rows and the command line. Read `report.py` (what is found), `rivals.py` (what is
compared), `race.py` (how).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
