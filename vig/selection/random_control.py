"""The control for every selection: the same number of supervised tokens, drawn at random."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vig.scoring.scores import Score, Scores
from vig.selection.thresholds import Selection, check_scores

# Shapes: N = scored records, T = answer tokens of one record, A = answer tokens of several records together.

Level = Literal["both", "samples", "tokens"]


def random_selection(scores: Scores, like: Selection, seed: int = 0, level: Level = "both") -> Selection:
    """Make the control for `like`: exactly as many supervised tokens, drawn at random.

    End-of-turn tokens are drawn first, as far as the number of tokens allows. So the control differs in the words that it
    supervises, but it learns to stop like the selection.

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
    order = rng.permutation(len(scores)).tolist()  # [N]
    lengths = np.array([len(score.token_vig) for score in scores])  # [N]
    budget = like.summary().tokens_kept
    if level == "both":
        order = _exchanged(order, lengths, len(like.token_masks), budget)
    elif level == "samples":
        order = _until(order, lengths, budget)
    picked = [scores[i] for i in (sorted(order) if level != "samples" else order)]
    priority = [_priority(score, rng) for score in picked]  # [T] for each sample
    if level == "samples":  # all of every sample but the last
        priority = [values - 2 for values in priority[:-1]] + priority[-1:]
    flat = np.concatenate(priority or [np.empty(0)])  # [A]
    mask = np.zeros(len(flat), dtype=bool)  # [A]
    mask[np.argsort(flat)[:budget]] = True
    parts = np.split(mask, np.cumsum([len(p) for p in priority])[:-1])
    masks = {score.id: part for score, part in zip(picked, parts, strict=False)}
    return Selection(None, {id: masks[id] for id in scores.ids if id in masks}, scores, like.sources)


def _exchanged(order: list[int], lengths: NDArray[np.int64], count: int, budget: int) -> list[int]:
    """The first `count` samples of `order`. If they have too few tokens, the longest other samples replace the shortest of them."""
    chosen, rest = (sorted(part, key=lambda i: lengths[i]) for part in (order[:count], order[count:]))
    for place, longest in zip(range(len(chosen)), reversed(rest), strict=False):
        if lengths[chosen].sum() >= budget:
            break
        chosen[place] = longest
    return chosen


def _until(order: list[int], lengths: NDArray[np.int64], budget: int) -> list[int]:
    """The first samples of `order`, as many as are needed for `budget` tokens."""
    before = itertools.accumulate(lengths[order].tolist(), initial=0)
    return [i for i, sum_before in zip(order, before, strict=False) if sum_before < budget]


def _priority(score: Score, rng: np.random.Generator) -> NDArray[np.float64]:
    """A random number for each token, [T]. The lowest are supervised, end-of-turn tokens before all others."""
    priority = rng.random(len(score.token_vig))  # [T]
    priority[score.turn_ends] -= 1
    return priority
