"""A linear probe of every layer of an encoder finds the layers that tell left from right, three from four, open from closed.

The pairs have MMVP's layout (`mof.evals.mmvp`): a question about two images with two different answers. For each pattern, ridge
regression from a layer's patch tokens to the answers is fitted on four fifths of the pairs and measured on the others, in turn. A pair
counts if, of the pair's two answers, the right answer scores higher for both images, so chance is 25 % as in MMVP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from encoders import Encoder, build_encoder
from encoders.progress import tracked
from encoders.whole_files import write_json, write_text
from mof.evals.intervals import Tally, mean_interval
from mof.evals.mmvp import Question

# Shapes: N images, two per pair, U pairs, A answers, G x G cells of tokens, C channels of a layer, D = G * G * C, L layers.

FOLDS, SEED = 5, 0
STRENGTHS = np.logspace(-4, 2, 13)
"""Strengths of the ridge penalty, as multiples of the features' mean variance. Leave-one-out on the fitted pairs chooses."""
FEWEST = 2  # pairs in which an answer occurs, so that it can be learnt from other pairs
Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerProbe:
    """LayerProbe holds the result of `probe_layers` for an encoder."""

    encoder: str
    layers: tuple[int, ...]
    """Counted from the front: k is the output of the k-th block."""
    pairs: dict[str, int]
    """Pattern -> number of pairs."""
    left_out: int
    """Pairs with an answer that occurs in no other pair of the pattern."""
    by_pattern: dict[str, list[float]]
    """Pattern -> for each layer, the share of right pairs."""
    average: list[float]
    """For each layer, the share of right pairs of all patterns."""
    intervals: list[tuple[float, float]]
    """For each layer, the 95 % interval of the average over pairs."""

    def rows(self) -> dict[str, dict[str, float]]:
        """Return layer -> {pattern: right pairs in %, ..., "average": ...}."""
        return {
            str(layer): {name: 100 * shares[place] for name, shares in self.by_pattern.items()} | {"average": 100 * self.average[place]}
            for place, layer in enumerate(self.layers)
        }

    def write(self, folder: Path, stem: str) -> None:
        """Write the result as STEM.layers.json and STEM.layers.csv."""
        write_json(folder / f"{stem}.layers.json", {"benchmark": "layers", **vars(self)})
        columns = [*self.by_pattern, "average"]
        lines = [",".join(["layer", *columns]), *(",".join([k, *(f"{row[c]:.2f}" for c in columns)]) for k, row in self.rows().items())]
        write_text(folder / f"{stem}.layers.csv", "\n".join(lines) + "\n")


def probe_layers(name: str, questions: Sequence[Question], *, cells: int = 4, progress: bool = False) -> LayerProbe:
    """Probe every layer of an encoder, on the GPU if there is a GPU.

    Args:
        name: the encoder, as `build_encoder` takes it.
        questions: of `read_mmvp`, with images. Questions without a pattern are a pattern of their own, "all".
        cells: tokens are averaged over `cells` x `cells` parts of the image; 1 averages over the whole image, which forgets places.

    Raises:
        ValueError: if no pair has answers that occur in other pairs too, `cells` is below 1, or tokens of an image are not finite.
    """
    if cells < 1:
        raise ValueError(f"cells should be at least 1, got {cells}")
    groups = _groups(questions)
    kept = [pair for pairs in groups.values() for pair in pairs]
    if not kept:
        raise ValueError(f"none of the {len(questions) // 2} pairs has two answers that occur in other pairs of its pattern too")
    images = [str(question.image) for pair in kept for question in pair]
    layers, features = _features(name, images, cells, progress)
    bounds = np.cumsum([0, *(len(pairs) for pairs in groups.values())])
    right = np.empty((len(layers), len(kept)), bool)  # [L, U]
    for place, of_layer in enumerate(features):  # [N, D]
        for pairs, start, end in zip(groups.values(), bounds, bounds[1:], strict=False):
            right[place, start:end] = right_pairs(of_layer[2 * start : 2 * end], [_answers(pair) for pair in pairs])
    units = [f"{a.id} {b.id}" for a, b in kept]
    by_pattern = {
        pattern: right[:, start:end].mean(axis=1).tolist() for pattern, start, end in zip(groups, bounds, bounds[1:], strict=False)
    }
    intervals = [mean_interval([Tally.of(units, row, 1)]) or (np.nan, np.nan) for row in right]
    pairs_of = {pattern: len(pairs) for pattern, pairs in groups.items()}
    left_out = len(questions) // 2 - len(kept)
    return LayerProbe(name, layers, pairs_of, left_out, by_pattern, right.mean(axis=1).tolist(), intervals)


def _answers(pair: tuple[Question, Question]) -> tuple[str, str]:
    first, second = (question.options[question.labels["corrected"]].strip().lower() for question in pair)
    return first, second


def _groups(questions: Sequence[Question]) -> dict[str, list[tuple[Question, Question]]]:
    """Return pattern -> its pairs whose two answers differ and occur in at least `FEWEST` of these pairs."""
    groups: dict[str, list[tuple[Question, Question]]] = {}
    for pair in zip(questions[0::2], questions[1::2], strict=True):
        groups.setdefault(pair[0].pattern or "all", []).append(pair)
    kept = {pattern: _learnable(pairs) for pattern, pairs in groups.items()}
    return {pattern: pairs for pattern, pairs in kept.items() if pairs}


def _learnable(pairs: list[tuple[Question, Question]]) -> list[tuple[Question, Question]]:
    counts = Counter(answer for pair in pairs for answer in set(_answers(pair)))
    kept = [pair for pair in pairs if len(set(_answers(pair))) == 2 and min(counts[answer] for answer in _answers(pair)) >= FEWEST]
    return kept if len(kept) == len(pairs) else _learnable(kept)  # a pair that is left out takes its answers along


def _features(name: str, images: Sequence[str], cells: int, progress: bool) -> tuple[tuple[int, ...], Iterator[Array] | list[Array]]:
    """Return the layers, and the features [N, D] of each. Layers on one grid come out of a single pass."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    deepest = build_encoder(name, layer=-1)
    layers = tuple(range(1, deepest.blocks + 1))
    try:
        encoder = build_encoder(name, layer=list(layers), image_size=deepest.image_size).to(device)
    except ValueError:  # the stages of a convolutional network lie on different grids
        return layers, (_encoded(build_encoder(name, layer=layer).to(device), images, cells, progress)[0] for layer in layers)
    return layers, _encoded(encoder, images, cells, progress)


@torch.inference_mode()
def _encoded(encoder: Encoder, images: Sequence[str], cells: int, progress: bool) -> list[Array]:
    """Return [N, D] for each layer of the encoder."""
    rows = []
    for image in tracked(images, f"images of {encoder.name}", shown=progress):
        tokens, grid = encoder(encoder.pixels(image)[None])  # [1, h*w, channels of all layers]
        maps = tokens.transpose(1, 2).unflatten(2, grid).float()  # [1, channels, h, w]
        if not maps.isfinite().all():
            raise ValueError(f"{image}: tokens of {encoder.name} are not finite")
        rows.append(F.adaptive_avg_pool2d(maps, (min(cells, grid[0]), min(cells, grid[1])))[0].cpu())
    split = torch.stack(rows).split(encoder.layer_widths, dim=1)  # L of [N, C, G, G]
    return [part.flatten(1).double().numpy() for part in split]


def right_pairs(features: Array, answers: Sequence[tuple[str, str]]) -> NDArray[np.bool_]:
    """Return [U], whether each pair is right when it is not among the pairs that the probe was fitted on.

    Args:
        features: [2 * U, D]; the rows 2k and 2k + 1 are the images of pair k.
        answers: the answers for the two images of each pair.
    """
    names = {answer: column for column, answer in enumerate(sorted({answer for pair in answers for answer in pair}))}
    columns = np.array([[names[answer] for answer in pair] for pair in answers])  # [U, 2]
    targets = np.eye(len(names))[columns.reshape(-1)]  # [N, A]
    fold = np.random.default_rng(SEED).permutation(len(answers)) % min(FOLDS, len(answers))  # [U]
    right = np.empty(len(answers), bool)
    for number in range(fold.max() + 1):
        held = np.repeat(fold == number, 2)  # [N]
        scores = ridge(features[~held], targets[~held], features[held]).reshape(-1, 2, len(names))  # [U', 2, A]
        own = columns[fold == number]  # [U', 2]
        of_own, of_other = (np.take_along_axis(scores, index[:, :, None], axis=2)[:, :, 0] for index in (own, own[:, ::-1]))
        right[fold == number] = (of_own > of_other).all(axis=1)
    return right


def ridge(features: Array, targets: Array, unseen: Array) -> Array:
    """Return the predictions [M, A] for unseen features [M, D] of ridge regression from features [N, D] to targets [N, A].

    Features are standardised. The strength in `STRENGTHS` with the least squared leave-one-out error is taken.
    """
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 1e-9, spread, 1) * np.sqrt(features.shape[1])
    fitted, others = (features - mean) / spread, (unseen - mean) / spread  # [N, D], [M, D]
    level = targets.mean(axis=0)  # [A]
    values, vectors = np.linalg.eigh(fitted @ fitted.T)  # [N], [N, N]
    turned = vectors.T @ (targets - level)  # [N, A]
    best, weights = np.inf, np.zeros_like(targets)
    for strength in STRENGTHS:
        kept = 1 / (np.maximum(values, 0) + strength)  # [N]
        duals = vectors @ (kept[:, None] * turned)  # [N, A]
        inverse_diagonal = (vectors**2) @ kept  # [N]
        error = float(((duals / inverse_diagonal[:, None]) ** 2).mean())  # the residuals without each image itself
        if error < best:
            best, weights = error, duals
    return others @ (fitted.T @ weights) + level
