from .features import FeatureCache as FeatureCache, check_kind as check_kind
from .heads import (
    FitSettings as FitSettings,
    FittedHeads as FittedHeads,
    fit_heads as fit_heads,
    with_exits as with_exits,
)
