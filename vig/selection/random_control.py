"""The control for a selection has the same number of supervised tokens, drawn at random."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vig.scoring.scores import Scores
from vig.selection.selected import PerToken, Selection
from vig.selection.thresholds import check_scores

# Shapes: N = scored records, A = answer tokens of the drawn records together.

Level = Literal["both", "samples", "tokens"]


def random_selection(scores: Scores, like: Selection, seed: int = 0, level: Level = "both") -> Selection:
    """Make the control for `like`: exactly as many supervised tokens, drawn at random.

    End-of-turn tokens are drawn first, as far as the number of tokens allows. So the control differs in the words that it
    supervises, but it learns to stop like the selection. A seed draws the same tokens in whatever order the records were scored: the
    order depends on the size of the batches, and on whether scoring was stopped and went on.

    Args:
        level: "both" draws as many samples as `like` has, and tokens in them. If these samples have too few tokens, the shortest
            are exchanged for the longest of the other samples. "samples" draws whole samples until there are enough tokens; only
            the last sample may be cut. "tokens" draws tokens from all samples.

    Raises:
        ValueError: for no scores, scores that `like` was not made from, or an unknown level.
    """
    check_scores(scores)
    if like.scores.ids != scores.ids:
        raise ValueError("like was made from other scores; give the same scores to select and random_selection")
    if level not in ("both", "samples", "tokens"):
        raise ValueError(f"level is 'both', 'samples' or 'tokens'; got {level!r}")
    rng = np.random.default_rng(seed)
    by_id = pc.array_sort_indices(pa.array(scores.ids, pa.string())).to_numpy()  # [N]
    order = by_id[rng.permutation(len(scores))]  # [N]
    lengths, budget = np.diff(scores.bounds), like.summary().tokens_kept
    if level == "both":
        order = _exchanged(order, lengths, len(like.token_masks), budget)
    elif level == "samples":
        order = _until(order, lengths, budget)
    drawn = np.zeros(len(scores), bool)  # [N]
    drawn[order] = True
    if level != "samples":
        order = by_id[drawn[by_id]]
    places = scores.tokens_of(order)  # [A]
    is_end = np.zeros(len(scores.token_vig), bool)
    is_end[scores.turn_ends] = True
    priority = rng.random(len(places)) - is_end[places]  # [A] the lowest are supervised, end-of-turn tokens before all others
    if level == "samples":  # all of every sample but the last
        priority[: len(places) - lengths[order[-1:]].sum()] -= 2
    mask = np.zeros(len(scores.token_vig), bool)  # a value for each answer token of all scores
    mask[places[np.argsort(priority)[:budget]]] = True
    return Selection(None, PerToken(scores, drawn, mask), scores, like.sources)


def _exchanged(order: NDArray[np.int64], lengths: NDArray[np.int64], count: int, budget: int) -> NDArray[np.int64]:
    """Return the first `count` samples of `order`. If they have too few tokens, the longest other samples replace the shortest of them."""
    chosen, rest = (part[np.argsort(lengths[part], kind="stable")] for part in (order[:count], order[count:]))
    pairs = min(len(chosen), len(rest))
    longest = rest[::-1][:pairs]
    sums = lengths[chosen].sum() + np.append(0, (lengths[longest] - lengths[chosen[:pairs]]).cumsum())  # after 0, 1, ... exchanges
    exchanges = int((sums >= budget).argmax()) if (sums >= budget).any() else pairs
    chosen[:exchanges] = longest[:exchanges]
    return chosen


def _until(order: NDArray[np.int64], lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Return the first samples of `order`, as many as are needed for `budget` tokens."""
    return order[lengths[order].cumsum() - lengths[order] < budget]
