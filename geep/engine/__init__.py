"""The engine: texts in, predictions out.

The room refuses to know labels and files of rows. Read `settings.py` (what is decided), `admission.py` (what is
refused), `deployment.py` (how it runs), `tokens.py`, `run.py`, `engine.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
