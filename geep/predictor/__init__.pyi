from .fitting import (
    ABSENT_LOGIT as ABSENT_LOGIT,
    LEXICAL_PENALTIES as LEXICAL_PENALTIES,
    PREDICTORS as PREDICTORS,
    RIDGE_ALPHAS as RIDGE_ALPHAS,
    TextExits as TextExits,
    fit_levels as fit_levels,
    fit_lexical as fit_lexical,
    fit_predictor as fit_predictor,
    score_by_counts as score_by_counts,
    score_by_ridge as score_by_ridge,
)
from .keys import Keys as Keys, text_hashes as text_hashes
from .predictor import ExitPrediction as ExitPrediction, ExitPredictor as ExitPredictor
from .table import (
    MAX_NGRAMS as MAX_NGRAMS,
    ExitTable as ExitTable,
    FittedTable as FittedTable,
    Levels as Levels,
    Lexical as Lexical,
    ScoreRows as ScoreRows,
)
