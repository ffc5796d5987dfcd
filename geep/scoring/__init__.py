"""Files scored as streams, killed and continued.

The room refuses to know how a prediction is made, and how files are read (`geep.data` does that). Read `stream.py`,
then `answers.py` (what an engine is asked, and what its answers add), `columns.py` (names of the result), `sinks.py`
(bytes that can be continued, gzip, Parquet) and `journal.py` (what a later run needs to go on).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
