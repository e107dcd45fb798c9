"""Fine-tuning of saved models on (selected) records: `mof train`, and the same from Python."""

from vig.training.finetuning import finetune

__all__ = ["finetune"]
