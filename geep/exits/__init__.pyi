from .criteria import (
    AGREEMENT as AGREEMENT,
    CRITERIA as CRITERIA,
    AgreementScore as AgreementScore,
    OnMiss as OnMiss,
    answer_of as answer_of,
    probabilities_of as probabilities_of,
    same_answers as same_answers,
    uncertainty as uncertainty,
)
from .fitting import (
    fit_agreement_score as fit_agreement_score,
    fit_fusing as fit_fusing,
    fit_temperature as fit_temperature,
)
from .fusing import Fusing as Fusing
from .profile import ExitProfile as ExitProfile, follow as follow, profile_exits as profile_exits
