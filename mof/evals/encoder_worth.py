"""encoder_worth measures the worth of each encoder of a mixture: a benchmark is asked again without it, and with other pictures.

The model is not trained again. The rates are defined in arXiv 2507.03262: the conditional utilisation rate of an encoder is the
share of the score that is lost without it, and the information gap is the largest rate minus the smallest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders import ImageError, read_image
from mof.data.records import ImageSource
from mof.evals.answerers import LocalModel
from mof.evals.answering import Answer, Prompt, image_hash
from mof.evals.benchmark import Row
from mof.evals.intervals import Difference, Figure, Interval, Tally, difference
from mof.evals.other_pictures import OtherPictures, Picture
from mof.evals.outcomes import BENCHMARKS, MEASURES, Outcome, read_outcome
from mof.evals.run import Run
from mof.mixer import Mixer

# Shapes: M images, P positions of the mixer's grid, C = width of an encoder, B prompts, L tokens of the longest, R resamples.

Replacement = Literal["mean", "zero", "mask"]
"""The tokens of the removed encoder become their mean over the benchmark's images, position by position ("mean"), or zeros ("zero"),
or the language model goes on as if they were not there ("mask")."""
MEAN_IMAGES = 64  # the images over which an encoder's tokens are averaged

Measurement = Callable[[Run], Row]
"""A function that asks a benchmark: `lambda run: eval_mmvp(run, questions)`."""


class WithoutEncoder:
    """WithoutEncoder is a model whose encoder `name` tells nothing about the image. The encoder's tokens are replaced before the adapters.

    Args:
        images: the benchmark's images, without repetition; the mean is taken over `MEAN_IMAGES` of them, evenly spaced.

    Raises:
        ValueError: for a model that is no mixture of features, an encoder that it does not have, a mean of no readable image, or a
            mask where the tokens of all encoders are fused, or where the language model has a state, which masked tokens still change.
    """

    def __init__(self, model: LocalModel, name: str, replacement: Replacement, images: Sequence[ImageSource]) -> None:
        self._model, self._encoder, self._replacement = model, name, replacement
        self._mixer = mixer_of(model)
        if name not in self._mixer.encoders:
            raise ValueError(f"the model has no encoder {name!r}; expected {' or '.join(self._mixer.encoders)}")
        if replacement == "mask" and name not in self._mixer.token_places:
            raise ValueError(
                f"fusion {self._mixer.fusion!r} joins all encoders in each token, so {name!r} cannot be masked; use mean or zero"
            )
        if replacement == "mask" and self._model.model._is_stateful:
            raise ValueError(
                f"{type(self._model.model.language_model).__name__} keeps a state, which masked tokens still change, so {name!r} cannot "
                "be masked; use mean or zero"
            )
        self.name = f"{model.name} without {name}"
        self.settings = model.settings | {"without": name, "replacement": replacement}
        self._mean: Tensor | None = None
        if replacement == "mean":
            averaged = images[:: -(-len(images) // MEAN_IMAGES) or 1]
            self._mean, hashes = self._mean_features(averaged)  # [P, C]
            self.settings["mean_of"] = hashlib.sha256("".join(hashes).encode()).hexdigest()[:32]

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        if self._replacement == "mask":
            with _in_place_of(self._model, "encode", self._masked):
                yield from self._model.answer(prompts)
        else:
            with _in_place_of(self._mixer, "fuse", self._fused):
                yield from self._model.answer(prompts)

    def _fused(self, fuse: Callable[[dict[str, Tensor]], Tensor], features: dict[str, Tensor]) -> Tensor:
        tokens = features[self._encoder]  # [M, P, C]
        instead = torch.zeros_like(tokens) if self._mean is None else self._mean.to(tokens).expand_as(tokens)  # [M, P, C]
        return fuse({**features, self._encoder: instead})

    def _masked(self, encode: Callable[[Sequence[Any]], Any], chats: Sequence[Any]) -> Any:
        inputs = encode(chats)
        image_tokens = inputs["input_ids"] == self._model.model.config.image_token_id  # [B, L]
        order = image_tokens.flatten().cumsum(0).sub(1).view_as(image_tokens) % self._mixer.tokens_per_image  # [B, L]
        hidden = torch.zeros(self._mixer.tokens_per_image, dtype=torch.bool, device=order.device)
        hidden[list(self._mixer.token_places[self._encoder])] = True
        inputs["attention_mask"] = inputs["attention_mask"].masked_fill(image_tokens & hidden[order], 0)  # [B, L]
        return inputs

    @torch.inference_mode()
    def _mean_features(self, images: Sequence[ImageSource]) -> tuple[Tensor, list[str]]:
        """Return the mean [P, C] of the encoder's tokens at the common grid, and the hashes of the images that could be read."""
        total, count, hashes = torch.zeros((), dtype=torch.float64), 0, list[str]()
        for image in images:
            try:
                shown = read_image(image)
                hashes.append(image_hash(image))
            except ImageError:  # the prompts about it are refused in every run
                continue
            pixels = self._model.processor.image_processor(shown, return_tensors="pt")["pixel_values"]  # [tiles, 3, S, S]
            tokens = self._mixer.encode(pixels.to(self._model.model.device))[self._encoder]  # [tiles, P, C]
            total, count = total + tokens.double().sum(0), count + len(tokens)  # [P, C]
        if not count:
            given = f"{len(images)} that cannot be read" if images else "none"
            raise ValueError(f"the mean of an encoder's tokens needs images, got {given}")
        return total / count, hashes


@dataclass(frozen=True)
class Worth:
    """Worth is the benchmark's headline without an encoder, or with other pictures, beside the whole model's headline."""

    score: float
    loss: Difference
    """The whole model's score minus `score`, with the paired interval; the reverse for a measure that is better when lower."""
    rate: float
    """The loss as a share of the whole model's score: the conditional utilisation rate. NaN for a score that is not above 0."""
    rate_interval: Interval
    parts: dict[str, Worth] = field(default_factory=dict)
    """Part of the benchmark -> the worth on this part alone: MMVP's patterns where questions name them, POPE's strategies."""


@dataclass(frozen=True)
class EncoderWorth:
    """EncoderWorth is the result of `encoder_worth`."""

    measure: str
    """The title of the headline, with its unit."""
    scale: float
    """The factor from scores to this unit: 100 for a share that is shown in %."""
    score: float
    encoders: dict[str, Worth]
    pictures: dict[str, Worth]
    """"blurred" and "swapped" -> the worth of the image as a whole."""
    parts: dict[str, float]
    """Part of the benchmark -> the whole model's score."""

    @property
    def information_gap(self) -> float:
        """Return the largest utilisation rate of an encoder minus the smallest; it is NaN where a rate is NaN."""
        return float(np.ptp([worth.rate for worth in self.encoders.values()]))


def encoder_worth(
    model: LocalModel,
    measurement: Measurement,
    images: Sequence[ImageSource],
    output: str | Path,
    *,
    replacement: Replacement = "mean",
    run: Run | None = None,
) -> EncoderWorth:
    """Ask a benchmark of the whole model, without each encoder, and with blurred and swapped images.

    Args:
        measurement: asks the benchmark: `lambda run: eval_mmvp(run, questions)`, or eval_pope, eval_chair or eval_captions.
        images: the benchmark's images, without repetition.
        output: gets the folder of an evaluation for each of these, which `mof eval report` reads. A run that was stopped goes on.
        run: the name, seed and progress bar of the runs.

    Raises:
        ValueError: as `WithoutEncoder`, and for an output of another evaluation.
    """
    if replacement not in get_args(Replacement):
        raise ValueError(f"replacement should be one of {', '.join(get_args(Replacement))}, got {replacement!r}")
    run = run or Run(Path(output), model)
    answerers: dict[str, Any] = {"all": model}
    answerers |= {f"without-{name}": WithoutEncoder(model, name, replacement, images) for name in mixer_of(model).encoders}
    answerers |= {picture: OtherPictures(model, picture, images) for picture in get_args(Picture)}
    measured = {}
    for folder, answerer in answerers.items():
        name = None if run.name is None else answerer.name.replace(model.name, run.name, 1)
        measurement(replace(run, folder=Path(output) / folder, answerer=answerer, name=name))
        measured[folder] = read_outcome(Path(output) / folder)
    whole = measured.pop("all")
    measure = BENCHMARKS[whole.benchmark].HEADLINE[0]
    worths = {folder: _worth(measure, whole, other) for folder, other in measured.items()}
    encoders = {name: worths[f"without-{name}"] for name in mixer_of(model).encoders}
    pictures = {picture: worths[picture] for picture in get_args(Picture)}
    title = f"{MEASURES[measure].benchmark} {MEASURES[measure].title}"
    parts = {name: figure.value for name, figure in whole.parts.items()}
    return EncoderWorth(title, MEASURES[measure].scale, whole.figures[measure].value, encoders, pictures, parts)


def _worth(measure: str, whole: Outcome, other: Outcome) -> Worth:
    lower = MEASURES[measure].better == "lower"
    parts = {name: _compared(figure, other.parts[name], lower) for name, figure in whole.parts.items()}
    return replace(_compared(whole.figures[measure], other.figures[measure], lower), parts=parts)


def _compared(whole: Figure, other: Figure, lower: bool) -> Worth:
    """Return the worth of the encoder or image that `other` lacks. With `lower`, a lower figure is better."""
    assert isinstance(whole, Tally) and isinstance(other, Tally)
    whole, other = whole.among(other.units), other.among(whole.units)  # a prompt that one run refused counts in neither
    loss = difference([other], [whole]) if lower else difference([whole], [other])
    assert loss is not None  # the same questions
    sign = -1 if lower else 1
    rates = sign * (1 - other.resampled / _positive(whole.resampled))  # [R]
    rate = float(sign * (1 - other.value / _positive(np.array(whole.value))))
    known = rates[~np.isnan(rates)] if np.isfinite(rate) else rates[:0]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return Worth(other.value, loss, rate, (float(low), float(high)))


def _positive(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the scores, with NaN in place of scores that are not above 0, because no number is a share of them."""
    return np.where(scores > 0, scores, np.nan)


def mixer_of(model: LocalModel) -> Mixer:
    """Return the model's mixer. ValueError for a model that is no mixture of features."""
    mixer = getattr(model.model, "mixer", None)
    if not isinstance(mixer, Mixer):
        raise ValueError(f"{type(model.model).__name__} is no mixture of features: expected a MoFForConditionalGeneration")
    return mixer


@contextmanager
def _in_place_of(holder: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """In this context, a call of the holder's method calls `function` with the method and its arguments."""
    method = getattr(holder, name)
    setattr(holder, name, lambda *arguments: function(method, *arguments))
    try:
        yield
    finally:
        delattr(holder, name)
