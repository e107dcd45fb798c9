"""What a model's answers owe to the right image, on records that no training saw."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from vig.scoring.run import score
from vig.word_classes import vig_by_word_class


def right_against_other_image(model: PreTrainedModel, processor: ProcessorMixin, records: Sequence[Any], **options: Any) -> dict[str, Any]:
    """VIG of the right photo against another record's (null="shuffle"): mean, spread, share above 0, losses, and by kind of word.

    Args:
        **options: of `vig.score`.
    """
    scores = score(model, processor, records, null="shuffle", **options)
    vig = scores.vig
    return {
        "captions": len(vig),
        "mean_vig": float(vig.mean()),
        "std_vig": float(vig.std()),
        "share_positive": float((vig > 0).mean()),
        "loss_right_photo": statistics.fmean(one.loss for one in scores),
        "loss_other_photo": statistics.fmean(one.null_loss for one in scores),
        "vig_by_word_class": vig_by_word_class(scores),
    }
