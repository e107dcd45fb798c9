"""Whether two sets of scores are the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vig import Score


def assert_same(a: Sequence[Score], b: Sequence[Score], atol: float = 0.0) -> None:
    """Whatever their order: a folder holds scores in the order of scoring."""
    assert sorted(s.id for s in a) == sorted(s.id for s in b)
    for x, y in zip(*(sorted(scores, key=lambda s: s.id) for scores in (a, b)), strict=True):
        for name in ("vig", "loss", "null_loss", "token_vig", "token_ids", "turn_ends"):
            np.testing.assert_allclose(getattr(x, name), getattr(y, name), atol=atol, rtol=0)
            assert np.asarray(getattr(x, name)).dtype == np.asarray(getattr(y, name)).dtype
        assert x.digest == y.digest
