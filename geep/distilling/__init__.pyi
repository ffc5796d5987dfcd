from .features import FeatureCache as FeatureCache
from .heads import (
    FitSettings as FitSettings,
    FittedHeads as FittedHeads,
    fit_heads as fit_heads,
    with_exits as with_exits,
)
