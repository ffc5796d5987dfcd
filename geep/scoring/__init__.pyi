from .answers import ScoredColumns as ScoredColumns
from .answers import Scorer as Scorer
from .stream import ScoreReport as ScoreReport
from .stream import score_file as score_file
