"""geep: BERT-class text classifiers with early exits whose layer is predicted before the run.

Every public name can be had from here, and is looked up when it is first asked for: `import geep` loads neither torch
nor transformers. Names and where they live: `geep/__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
