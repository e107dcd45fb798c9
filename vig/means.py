"""A mean with what one must know to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Mean(NamedTuple):
    """Of VIG, in nats."""

    mean: float
    n: int
    """How many values."""
    error: float | None
    """Standard error of the mean; None for fewer than two values."""

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.floating]) -> Mean:
        """Of at least one value."""
        array = np.asarray(values, dtype=np.float64)  # [N]
        error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else None
        return cls(float(array.mean()), len(array), error)
