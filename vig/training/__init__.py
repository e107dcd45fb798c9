"""This package fine-tunes saved models on (selected) records, for `mof train` and from Python."""

from vig.training.finetuning import finetune

__all__ = ["finetune"]
