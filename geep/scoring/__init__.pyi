from .answers import ScoredColumns as ScoredColumns, Scorer as Scorer
from .stream import ScoreReport as ScoreReport, score_file as score_file
