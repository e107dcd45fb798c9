"""mof.miniature is the embedded default: a small drawn world and its networks, which `recipes/train_miniature.py` trained."""

from mof.miniature.benchmarks import write_benchmarks
from mof.miniature.dataset import write_dataset

__all__ = ["write_benchmarks", "write_dataset"]
