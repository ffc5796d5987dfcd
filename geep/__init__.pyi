from ._version import __version__ as __version__
from .acceleration import Acceleration as Acceleration, accelerate as accelerate, train as train
from .backends import TokenBatch as TokenBatch
from .calibration import (
    Calibration as Calibration,
    ProfileResult as ProfileResult,
    calibrate as calibrate,
    profile as profile,
    quantise as quantise,
    save_refusal as save_refusal,
)
from .data import (
    DataPlan as DataPlan,
    Dataset as Dataset,
    FetchError as FetchError,
    Parts as Parts,
    SomeLabels as SomeLabels,
    Split as Split,
    divide as divide,
    fetch_encoder as fetch_encoder,
    load_dataset as load_dataset,
    load_split as load_split,
    read_labels as read_labels,
    unseen as unseen,
    write_to_label as write_to_label,
)
from .distilling import FitSettings as FitSettings
from .engine import (
    Certificate as Certificate,
    Engine as Engine,
    EngineConfig as EngineConfig,
    ExitSettings as ExitSettings,
    Prediction as Prediction,
    Predictions as Predictions,
)
from .evaluation import EvaluationReport as EvaluationReport, draw as draw, evaluate as evaluate, headline as headline
from .folder import CalibrationFile as CalibrationFile, Provenance as Provenance
from .hash_table import HashTable as HashTable
from .modeling import (
    ExitOutput as ExitOutput,
    GeepConfig as GeepConfig,
    GeepForSequenceClassification as GeepForSequenceClassification,
)
from .predictor import ExitPredictor as ExitPredictor
from .promise import (
    ConstantModelError as ConstantModelError,
    Drift as Drift,
    NothingCertifiedError as NothingCertifiedError,
    Promise as Promise,
    TooFewTextsError as TooFewTextsError,
    Traffic as Traffic,
)
from .scoring import ScoreReport as ScoreReport, score_file as score_file
from .training import (
    RECIPES as RECIPES,
    DevMetrics as DevMetrics,
    TrainResult as TrainResult,
    TrainSettings as TrainSettings,
    parts_of as parts_of,
)
