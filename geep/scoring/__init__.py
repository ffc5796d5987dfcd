"""Files scored as streams, killed and continued.

The room refuses to know how a prediction is made, and how files are read (`geep.data` does that). Read `stream.py`,
then `chunks.py` (rows that are done together, and how they are known again), `answers.py` (what an engine is asked, and
what its answers add), `columns.py` and `values.py` (names, types and spelling in the result), `sinks.py` (the bytes of
a chunk), `result.py` (a result while it grows) and `journal.py` (what a later run needs to go on).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
