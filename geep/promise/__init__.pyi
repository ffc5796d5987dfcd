from .bounds import (
    RISKS as RISKS,
    PairedCounts as PairedCounts,
    Risk as Risk,
    clopper_pearson_upper as clopper_pearson_upper,
    drop_bound as drop_bound,
)
from .drift import Drift as Drift
from .promises import (
    ConstantModelError as ConstantModelError,
    NothingCertifiedError as NothingCertifiedError,
    Promise as Promise,
    TooFewTextsError as TooFewTextsError,
    check_enough as check_enough,
)
from .traffic import Traffic as Traffic
from .walking import Trial as Trial, Walk as Walk, walk as walk
