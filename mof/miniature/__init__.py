"""The embedded default: a small drawn world, and the networks that were trained on it (`recipes/train_miniature.py`)."""

from mof.miniature.benchmarks import write_benchmarks
from mof.miniature.dataset import write_dataset

__all__ = ["write_benchmarks", "write_dataset"]
