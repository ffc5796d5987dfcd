"""Backends: ways to run an encoder layer by layer on texts that leave at different depths.

The room knows encoders, layers and packed tokens; it refuses to know texts, tables and thresholds. Read `protocol.py`
(what every backend offers), `padded.py` (Hugging Face's own layers), `packed_layer.py` and `packed.py` (no padding),
`forms.py` and `mixers.py` (what families build otherwise, and how their tokens look at each other),
`onednn.py` and `int8.py` (the same layer on a CPU's kernels), `tiles.py`, `graphs.py`, `staging.py` and `cuda.py` (the
same layer on a GPU), `likeness.py` (whether layers answer as the encoder does), `registry.py` (which there are).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
