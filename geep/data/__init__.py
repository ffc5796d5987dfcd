"""Texts and labels from files: rows, splits, the data sets and encoders that geep can fetch by name.

The room knows rows of files and which row is for what; it refuses to know tokens, models and predictions. Read
`rows.py`, `formats.py` (one file as a stream; it leads to `compression.py` and to the reader of each format),
`texts.py` (in memory, or in the mapped file of `spool.py`), `splits.py` (one whole file), `wheels.py`, `sources.py`
(the sets that have names), `hub.py`, `datasets.py` (train, dev and test together), `parts.py` (which row is for what),
`labelling.py` (labels asked for and given back).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
