"""A way chooses the tokens of stage 2. Noise is in its records. A study compares ways and noises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vig import Scores, Selection, random_selection, select

KEEPS = (0.3, 0.5, 0.7, 0.9)
"""Shares of the samples (or tokens) that the study of selections keeps."""
WAYS = {
    "vig": "the samples that the image helped most, and in them the tokens that it helped (the paper)",
    "vig-samples": "the same samples, with all of their tokens",
    "vig-tokens": "the tokens that the image helped most, of all samples",
    "random": "as many samples and tokens as `vig` has, drawn at random",
    "random-samples": "whole samples drawn at random, with as many tokens as `vig-samples` has",
}
"""The ways that --compare selection has at every share."""
NOISE_WAYS = {
    "everything": "all tokens",
    "vig": WAYS["vig"],
    "random": WAYS["random"],
    "lowest-loss": "whole samples with the lowest loss, as many as `vig-samples` has",
    "grounded": "the samples without noise, which an oracle knows",
    "vig-floor": "the samples and tokens with a VIG that is not negative",
    "floor-samples": "whole samples with a VIG that is not negative",
    "random-floor": "whole samples drawn at random, with as many tokens as `floor-samples` has",
    "vig-shuffled": "as `vig`, but each sample has the VIG of another sample, and its tokens have each other's",
    "vig-samples": WAYS["vig-samples"],
    "vig-tokens": WAYS["vig-tokens"],
    "gain-samples": "whole samples whose words the image made most probable (measure `gain`), as many as `vig-samples` has",
    "vig-steps": "the samples and tokens of `vig`, for as many optimizer steps as `everything` takes",
}
"""The ways that --compare noise has with every noise."""
NOISE: dict[str, dict[str, float]] = {
    "0.4": {"ungrounded": 0.4},
    "mixed": {"guessable": 0.15, "boilerplate": 0.1, "plausible": 0.15},
    "0": {},
    "0.2": {"ungrounded": 0.2},
    "0.6": {"ungrounded": 0.6},
}
"""Name -> the share for each kind of noise (`mof.miniature.noise`), of the records that ask five questions about a picture."""


def select_by(way: str, scores: Scores, keep: float, seed: int) -> Selection:
    """Return the selection that a way of `WAYS` or `NOISE_WAYS` makes."""
    if way == "vig-tokens":
        return select(scores, keep=1, token_keep=keep)
    if way == "gain-samples":
        return select(scores, keep=keep, by="gain", token_threshold=None)
    if way == "vig-floor":
        return select(scores, floor=True)
    if way in ("floor-samples", "random-floor"):
        selection = select(scores, floor=True, token_threshold=None)
        return selection if way == "floor-samples" else random_selection(scores, selection, seed, "samples")
    if way == "lowest-loss":
        by_loss = Scores([replace(score, vig=-score.loss) for score in scores], scores.manifest)
        return select(by_loss, keep=keep, token_threshold=None)
    if way == "vig-shuffled":
        return select(shuffled(scores, seed), keep=keep)
    selection = select(scores, keep=keep, token_threshold=None if way.endswith("samples") else "shared")
    if way.startswith("random"):
        return random_selection(scores, selection, seed, "samples" if way == "random-samples" else "both")
    return selection


def shuffled(scores: Scores, seed: int) -> Scores:
    """Return scores in which VIG says nothing: each sample has the VIG of another sample, and its tokens have each other's.

    A seed gives a sample the same values in whatever order the records were scored.
    """
    rng = np.random.default_rng([seed, 2])
    by_id = sorted(scores, key=lambda score: score.id)
    vig = rng.permutation([score.vig for score in by_id])
    return Scores(
        [replace(score, vig=float(other), token_vig=rng.permutation(score.token_vig)) for score, other in zip(by_id, vig, strict=True)],
        scores.manifest,
    )
