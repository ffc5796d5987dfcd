from .certifying import (
    MAX_LABELS as MAX_LABELS,
    Calibration as Calibration,
    calibrate as calibrate,
    save_refusal as save_refusal,
    unlearned as unlearned,
)
from .choosing import (
    TRIAL_QUANTILES as TRIAL_QUANTILES,
    TRIAL_SPEEDS as TRIAL_SPEEDS,
    Choice as Choice,
    choose as choose,
)
from .keeping import kept_run as kept_run
from .labelling import Wanted as Wanted, labels_wanted as labels_wanted
from .learning import fit_agreement as fit_agreement, learn_settings as learn_settings
from .leaving import Answered as Answered, Leavers as Leavers
from .ordering import Route as Route
from .profiling import (
    TABLE_SPEEDS as TABLE_SPEEDS,
    PredictorQuality as PredictorQuality,
    ProfileResult as ProfileResult,
    layer_quality as layer_quality,
    predictor_quality as predictor_quality,
    profile as profile,
)
from .quantising import RoundedTooFarError as RoundedTooFarError, quantise as quantise
from .runs import ExitRun as ExitRun, Outcomes as Outcomes, run_of as run_of, try_speed as try_speed
