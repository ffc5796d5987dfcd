"""A model folder on disk: names of its files, where they are, and how they are written.

The room refuses to know what is inside model, table and settings.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
