from .scoring.run import score
from .scoring.score_table import Score
from .scoring.scores import Scores, load_scores
from .selection.random_control import random_selection
from .selection.selected import Selection
from .selection.sources import record_sources
from .selection.thresholds import select
from .training.trainer import SelectiveTrainer

__all__ = [
    "Score",
    "Scores",
    "Selection",
    "SelectiveTrainer",
    "load_scores",
    "random_selection",
    "record_sources",
    "score",
    "select",
]
