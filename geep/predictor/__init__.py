"""Exit layers from token ids, and a first guess at the label.

The room knows token ids and exits. It refuses to know models, tokenizers and schedules: who wants a table tells it
where the texts left. Read `keys.py`, `parts.py`, `table.py`, `predictor.py`, then `file.py`. How all is learned stands
in `features.py`, `linear.py` and `fitting.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
