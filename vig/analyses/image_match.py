"""Does VIG see whether an image fits? The same answers are scored with their own image, a partly matching and a conflicting image."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from mof.data.digests import digest, record_id
from mof.data.forms import to_mapping
from mof.data.records import RecordError, images_of, texts_of
from mof.data.rows import RawRecord
from vig.scoring.calibration import places
from vig.scoring.run import score
from vig.words import Mean, vig_by_word_class, word_class

CANDIDATES = 50  # other images that a record can choose from, drawn anew for each record

Groups = Mapping[str, Sequence[RawRecord]]


@dataclass(frozen=True)
class MatchRow:
    """A MatchRow is the VIG of the same answers with one kind of image."""

    vig: Mean
    """Sample VIG."""
    positive: float
    """Share of the records that the image helped."""
    auroc: Mean | None = None
    """Chance that VIG is higher for a record with an image of the first group than for a record of this group, with the standard error by
    DeLong's method, which knows that both groups hold the same answers. None for the first group."""


def image_match(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    groups: Groups,
    output_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, MatchRow]:
    """Return name of a group -> its VIG, over the records that could be scored in all groups.

    The paper reports 0.923 nats for matching, 0.409 for partly matching and -0.520 for conflicting images.

    Args:
        groups: name -> records. The groups hold the same records, with the same ids, and differ in the images.
        output_dir: keeps the scores, a folder per group; an interrupted run in it is resumed.
        **options: passed on to `vig.score`.

    Raises:
        ValueError: for groups of different ids, or when no record could be scored in all of them.
    """
    ids = {name: sorted(map(record_id, records)) for name, records in groups.items()}
    first = next(iter(ids))
    if different := [name for name in ids if ids[name] != ids[first]]:
        raise ValueError(f"the groups {first!r} and {different[0]!r} hold records of other ids; each answer is scored with each image")
    folder = None if output_dir is None else Path(output_dir)
    runs = {name: score(model, processor, records, folder and folder / name, **options) for name, records in groups.items()}
    vig = {name: {record.id: record.vig for record in run} for name, run in runs.items()}
    common = [id for id in vig[first] if all(id in scored for scored in vig.values())]
    if not common:
        reasons = [reason for run in runs.values() for reason in run.failures.values()]
        raise ValueError(f"no record could be scored with each of its images; {reasons[0] if reasons else 'all are text-only'}")
    values = {name: np.array([scored[id] for id in common]) for name, scored in vig.items()}  # [records] each
    aurocs = {name: None if name == first else auroc(values[first], x) for name, x in values.items()}
    return {name: MatchRow(Mean.of(x), float((x > 0).mean()), aurocs[name]) for name, x in values.items()}


def auroc(own: NDArray[np.floating], other: NDArray[np.floating]) -> Mean:
    """Return the chance that a value of `own` [records] is above a value of `other` [the same records], with its standard error.

    Equal values count half. The error is DeLong's.
    """
    below = places(own, other)  # [records]: for each record with its own image
    above = 1 - places(other, own)  # [records]: for each record with its other image
    return Mean.of(below + above)._replace(mean=float(below.mean()))


def right_against_other_image(model: PreTrainedModel, processor: ProcessorMixin, records: Sequence[Any], **options: Any) -> dict[str, Any]:
    """Return the VIG of each record's own photo against another record's (null="shuffle"), for records that no training saw.

    The entries are the mean, the spread, the share above 0, both losses, and the mean by class of word.

    Args:
        **options: passed on to `vig.score`.
    """
    scores = score(model, processor, records, null="shuffle", **options)
    vig = scores.vig
    return {
        "captions": len(vig),
        "mean_vig": float(vig.mean()),
        "std_vig": float(vig.std()),
        "share_positive": float((vig > 0).mean()),
        "loss_right_photo": statistics.fmean(record.loss for record in scores),
        "loss_other_photo": statistics.fmean(record.null_loss for record in scores),
        "vig_by_word_class": vig_by_word_class(scores),
    }


def with_other_images(records: Sequence[RawRecord], seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the records with their own images ("matching"), with partly matching images, and with conflicting images.

    All images come from the records. An image is described by the words of all answers about it, without function words. For
    each record, 50 other images are drawn with the seed. The partly matching image shares the most words with the record's
    answers, the conflicting image shares the fewest; the first drawn wins a tie. A record is left out if it has several images or
    none, if it cannot be parsed, or if both images share equally many words.

    Raises:
        ValueError: when no record is left.
    """
    usable: list[tuple[RawRecord, str, set[str]]] = []  # record, key of its image, words of its answers
    images: dict[str, Any] = {}
    seen: dict[str, set[str]] = {}
    for raw in records:
        words = _words(raw)
        if words is not None and len(images_of(raw)) == 1:
            (image,) = images_of(raw)
            key = digest(image) if isinstance(image, Image.Image) else str(image)
            images[key] = image
            seen.setdefault(key, set()).update(words)
            usable.append((raw, key, words))
    keys, rng = sorted(seen), np.random.default_rng(seed)
    groups: dict[str, list[dict[str, Any]]] = {"matching": [], "partly matching": [], "conflicting": []}
    for raw, own, words in usable:
        drawn = [keys[i] for i in rng.permutation(len(keys))[: CANDIDATES + 1] if keys[i] != own][:CANDIDATES]
        shared = [len(words & seen[key]) for key in drawn]
        if not drawn or max(shared) == min(shared):
            continue
        chosen = (own, drawn[int(np.argmax(shared))], drawn[int(np.argmin(shared))])
        rest = {name: value for name, value in to_mapping(raw).items() if name not in ("image", "images")}
        for name, key in zip(groups, chosen, strict=True):
            groups[name].append(rest | {"id": record_id(raw), "image": images[key]})
    if not groups["matching"]:
        raise ValueError(
            f"none of {len(records)} records has words that some images share more than others; expected records with one image "
            "each and answers of more than a word or two"
        )
    return groups


def _words(raw: RawRecord) -> set[str] | None:
    """Return the words of a record's answers in lower case, without function words and words of one or two letters.

    The result is None for a record that cannot be parsed.
    """
    try:
        texts = texts_of(raw, "assistant")
    except RecordError:
        return None
    words = {word.lower() for text in texts for word in re.findall(r"\w+", text)}
    return {word for word in words if len(word) > 2 and word_class(word) != "function"}
