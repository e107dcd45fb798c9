"""VIG: how much the image helped each answer token, and training that spends its loss there (arXiv 2602.17186)."""

from vig.scores import Score, Scores, load_scores
from vig.scoring import score
from vig.selection import Selection, random_selection, select
from vig.trainer import SelectiveTrainer

__all__ = [
    "Score",
    "Scores",
    "Selection",
    "SelectiveTrainer",
    "load_scores",
    "random_selection",
    "score",
    "select",
]
