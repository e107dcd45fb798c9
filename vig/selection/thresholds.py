"""`select` chooses the samples and answer tokens that training spends its loss on, by a threshold of their VIG (arXiv 2602.17186)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vig.scoring.scores import Scores
from vig.selection.measures import Measure, excess_loss, measure_named
from vig.selection.selected import PerToken, Selection, source_codes

# Shapes: N = scored records, A = answer tokens of all scored records.


def select(
    scores: Scores,
    keep: float = 0.7,
    *,
    threshold: float | None = None,
    token_keep: float | None = None,
    token_threshold: Literal["shared"] | float | None = "shared",
    keep_end_of_turn: bool = True,
    sources: Mapping[str, str] | None = None,
    quota: float | Mapping[str, float] = 0.0,
    by: str = "vig",
    reference: Scores | None = None,
    floor: bool = False,
) -> Selection:
    """Keep the samples that the image helped most and, inside them, the tokens that it helped.

    A sample is kept when its VIG reaches the threshold tau. Tau is the lowest VIG in the top `keep` share of the samples (rounded
    up), so samples with a VIG equal to tau are kept too. The token sparsity follows from tau: see `Selection.summary`.

    With a quota, each source first keeps its own top share; the rest of `keep` goes to the best of all other samples. A source
    that is kept by its quota has a lower threshold than the other sources. With `token_threshold="shared"`, this also holds for
    its tokens.

    Args:
        keep: share of the scored samples, in [0, 1]. 1 keeps every sample, and together with `token_threshold=None` every
            token: this is plain training.
        threshold: tau itself, in nats, in place of `keep`.
        token_keep: share of the answer tokens of the kept samples, in [0, 1], in place of `token_threshold`. End-of-turn tokens
            may be kept in addition.
        token_threshold: the VIG from which a token is supervised. "shared" is tau (as in the paper), None supervises all tokens.
        keep_end_of_turn: supervise the end-of-turn tokens of kept samples whatever their VIG is. The image hardly ever helps to
            predict them, and without them a model forgets how to stop.
        sources: id -> source of each record (`vig.record_sources`). A record that is missing here has the source "(none)".
        quota: the smallest share to keep of every source, or a dict from sources to their smallest shares, in [0, 1].
        by: the measure in place of VIG (`vig.selection.measures`): "vig", "cal", "visnec", "vic", "entropy", "vppo" or "gain". All
            thresholds are of this measure. "visnec" and "vic" choose whole records: all their tokens are supervised.
        reference: scores of the same records by another model. The measure is then the loss minus the reference's loss (RHO-1).
        floor: keep everything but the samples and tokens that the image harmed: the threshold is the value of an image that changes
            nothing, 0 for VIG. `keep` and `threshold` do not matter then. A quota would bring harmed samples back.

    Raises:
        ValueError: for no scores, scores that are not finite, a share or threshold out of range, a quota for a source that no
            scored record has, or a measure that the scores do not have.
    """
    check_scores(scores)
    measure = measure_named(by, scores) if reference is None else Measure(partial(excess_loss, reference=reference))
    name = by if reference is None else "excess loss"
    if floor:
        if measure.neutral is None:
            raise ValueError(f"floor drops what the image harmed, which {name} does not tell; take vig, visnec, vic, entropy or gain")
        threshold = measure.neutral
    _check_share("keep", keep)
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold is None or a finite number of nats; got {threshold}")
    if token_threshold != "shared" and token_threshold is not None and not math.isfinite(token_threshold):
        raise ValueError(f"token_threshold is 'shared', None or a finite number; got {token_threshold}")
    names, codes = source_codes(scores, sources or {})
    tokens, values = measure.of(scores)  # [A] or None, [N]
    if tokens is None and (token_keep is not None or token_threshold not in ("shared", None)):
        raise ValueError(f"{name} chooses whole records; leave token_keep and token_threshold out")
    quotas = _quotas(quota, names)
    taus = np.array(_thresholds(values, keep, threshold, codes, quotas), np.float32)  # [sources]
    lengths = np.diff(scores.bounds)  # [N]
    chosen = values >= taus[codes]  # [N]
    in_chosen = np.repeat(chosen, lengths)  # [A]
    if tokens is None:
        tokens, token_threshold = np.zeros(len(scores.token_vig), np.float32), None
    elif token_keep is not None:
        _check_share("token_keep", token_keep)
        token_threshold = _threshold(tokens[in_chosen], token_keep)
    floors = taus[codes] if token_threshold == "shared" else -math.inf if token_threshold is None else token_threshold
    mask = tokens >= np.repeat(np.broadcast_to(np.float32(floors), len(scores)), lengths)  # [A]
    if keep_end_of_turn:
        mask[scores.turn_ends] = True
    masks = PerToken(scores, chosen, mask & in_chosen)
    return Selection(float(taus.max()), masks, scores, sources or {}, None, name, tokens, any(quotas))


def check_scores(scores: Scores) -> None:
    """Raise a ValueError for no scores, or scores that are not finite."""
    if not len(scores):
        raise ValueError("there are no scores to select from; were all records text-only or unreadable?")
    finite = np.isfinite(scores.vig)  # [N]
    if finite.all() and np.isfinite(scores.token_vig).all():
        return
    finite[np.repeat(np.arange(len(scores)), np.diff(scores.bounds))[~np.isfinite(scores.token_vig)]] = False
    first = scores.ids[int(finite.argmin())]
    raise ValueError(f"{int((~finite).sum())} scores are not finite, the first of record {first!r}; score them again")


def _quotas(quota: float | Mapping[str, float], names: Sequence[str]) -> list[float]:
    """Return the smallest share of each source, for all sources."""
    quotas = dict(quota) if isinstance(quota, Mapping) else dict.fromkeys(names, quota)
    for source, share in quotas.items():
        _check_share(f"the quota of {source!r}", share)
        if source not in names:
            raise ValueError(f"no scored record has the source {source!r}; there are {', '.join(names)}")
    return [quotas.get(name, 0.0) for name in names]


def _thresholds(
    vig: NDArray[np.float32], keep: float, threshold: float | None, codes: NDArray[np.int64], quotas: Sequence[float]
) -> list[float]:
    """Return the VIG from which samples are kept, for each source."""
    own = [_threshold(vig[codes == code], share) for code, share in enumerate(quotas)]
    by_quota = vig >= np.array(own)[codes]  # [N]
    if threshold is None:
        left = max(_count(keep, len(vig)) - int(by_quota.sum()), 0)
        threshold = float(np.sort(vig[~by_quota])[-left]) if left else math.inf
    return [min(threshold, lowest) for lowest in own]


def _threshold(values: NDArray[np.float32], share: float) -> float:
    """Return the lowest value in the top `share` of values; infinity when this share is empty."""
    count = _count(share, len(values))
    return float(np.sort(values)[-count]) if count else math.inf


def _count(share: float, total: int) -> int:
    return math.ceil(round(share * total, 6))  # 0.07 * 100 is a little more than 7 in floating point


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:  # refuses NaN too
        raise ValueError(f"{name} is a share, in [0, 1]; got {share}")
