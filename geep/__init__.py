"""geep: BERT-class text classifiers with early exits whose layer is predicted before the run."""

from geep._version import __version__
from geep.engine import Engine, EngineConfig, ExitSettings, Prediction
from geep.hash_table import HashTable
from geep.modeling import ExitOutput, GeepConfig, GeepForSequenceClassification
from geep.predictor import ExitPredictor

__all__ = [
    "Engine",
    "EngineConfig",
    "ExitOutput",
    "ExitPredictor",
    "ExitSettings",
    "GeepConfig",
    "GeepForSequenceClassification",
    "HashTable",
    "Prediction",
    "__version__",
]
