from .race import SWEEP as SWEEP, cpu_name as cpu_name, evaluate as evaluate, machine as machine
from .report import (
    EvaluationReport as EvaluationReport,
    EvaluationRow as EvaluationRow,
    Headline as Headline,
    draw as draw,
    headline as headline,
)
from .rivals import BATCH_SIZES as BATCH_SIZES, ShrinkingBatch as ShrinkingBatch, stable_oracle as stable_oracle
