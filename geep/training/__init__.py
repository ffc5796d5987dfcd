"""Training: losses, recipes made of stages, `run_recipe` for a model in memory, `fine_tune` for a model folder.

The room refuses to know how exits are fitted, tables, thresholds and how files of rows are read. Read `losses.py`,
`recipes.py`, `settings.py`, `rows.py`, `trainer.py`, which hands a stage to Hugging Face's Trainer, `fine_tuning.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
