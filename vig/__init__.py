"""VIG: how much the image helped each answer token, and training that spends its loss there (arXiv 2602.17186)."""

from vig.random_control import random_selection
from vig.scores import Score, Scores, load_scores
from vig.scoring import score
from vig.selection import Selection, select
from vig.sources import record_sources
from vig.trainer import SelectiveTrainer

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
