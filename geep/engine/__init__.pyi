from .certificate import Certificate as Certificate
from .cost import measure_cost as measure_cost
from .deployment import (
    DTYPES as DTYPES,
    Deployment as Deployment,
    EngineConfig as EngineConfig,
    EngineOptions as EngineOptions,
    load_model as load_model,
)
from .engine import Engine as Engine
from .planning import Plan as Plan, Planner as Planner
from .predictions import Prediction as Prediction, Predictions as Predictions
from .run import RunResult as RunResult
from .settings import ExitSettings as ExitSettings
from .stored import StoredExits as StoredExits
from .tokens import TextInput as TextInput, TokenizedTexts as TokenizedTexts
