"""Teach a trained model when it may stop: profile its exits, fill the exit table, keep a promise.

Everything here is measured on the engine as deployed, on texts that the model was not trained on. The room refuses to
know files of rows and the command line. Read `runs.py` (`leaving.py`), `profiling.py`, `choosing.py`, `ordering.py`,
`labelling.py`, `certifying.py`, `keeping.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
