"""Does VIG see whether an image fits? Answers scored with their own image, with one that fits in part, and with a wrong one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from mof.data.records import ROLES, digest, record_id
from vig.means import Mean
from vig.scoring.run import score
from vig.word_classes import word_class

CANDIDATES = 50  # other images that a record can choose from, drawn anew for each

Groups = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class MatchRow:
    """VIG of the same answers with one kind of image."""

    vig: Mean
    """Sample VIG."""
    positive: float
    """Share of the records that the image helped."""


def image_match(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    groups: Groups,
    output_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, MatchRow]:
    """Name of a group -> its VIG, over the records that could be scored in all groups.

    The paper reports 0.923 nats for matching, 0.409 for partly matching and -0.520 for conflicting images.

    Args:
        groups: name -> records. The groups hold the same records, with the same ids, and differ in the images.
        output_dir: keeps the scores, a folder per group, and takes up an interrupted run.
        **options: of `vig.score`.

    Raises:
        ValueError: for groups of other ids, or when no record could be scored in all of them.
    """
    ids = {name: sorted(map(record_id, records)) for name, records in groups.items()}
    first = next(iter(ids))
    if different := [name for name in ids if ids[name] != ids[first]]:
        raise ValueError(f"the groups {first!r} and {different[0]!r} hold records of other ids; each answer is scored with each image")
    folder = None if output_dir is None else Path(output_dir)
    runs = {name: score(model, processor, records, folder and folder / name, **options) for name, records in groups.items()}
    vig = {name: {one.id: one.vig for one in run} for name, run in runs.items()}
    common = [id for id in vig[first] if all(id in scored for scored in vig.values())]
    if not common:
        reasons = [reason for run in runs.values() for reason in run.failures.values()]
        raise ValueError(f"no record could be scored with each of its images; {reasons[0] if reasons else 'all are text-only'}")
    values = {name: np.array([scored[id] for id in common]) for name, scored in vig.items()}  # [records] each
    return {name: MatchRow(Mean.of(x), float((x > 0).mean())) for name, x in values.items()}


def with_other_images(records: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """The records with their own images ("matching"), with partly matching ones, and with conflicting ones.

    The images are those of the other records. What is in an image is told by the words of all answers about it, function
    words left out. Of 50 other images, drawn with the seed, the one that holds most of the words of the record's answers is
    the partly matching image, and the one that holds fewest is the conflicting one; of equals the first drawn. Left out are
    records with several images or none, and those for which the two images hold equally many of the words.

    Raises:
        ValueError: when no record is left.
    """
    usable = [dict(record) | {"id": record_id(record)} for record in records if _image(record) is not None]
    seen: dict[str, set[str]] = {}
    images: dict[str, Any] = {}
    for record in usable:
        key = _key(record)
        seen.setdefault(key, set()).update(_words(record))
        images[key] = _image(record)
    keys, rng = sorted(seen), np.random.default_rng(seed)
    groups: dict[str, list[dict[str, Any]]] = {"matching": [], "partly matching": [], "conflicting": []}
    for record in usable:
        own, words = _key(record), _words(record)
        drawn = [keys[i] for i in rng.permutation(len(keys))[: CANDIDATES + 1] if keys[i] != own][:CANDIDATES]
        shared = [len(words & seen[key]) for key in drawn]
        if not drawn or max(shared) == min(shared):
            continue
        chosen = (own, drawn[int(np.argmax(shared))], drawn[int(np.argmin(shared))])
        for name, key in zip(groups, chosen, strict=True):
            groups[name].append(_without_image(record) | {"image": images[key]})
    if not groups["matching"]:
        raise ValueError(
            f"{len(records)} records give none whose words some other images share more than others; expected records with one image "
            "each and answers of more than a word or two"
        )
    return groups


def _image(record: Mapping[str, Any]) -> Any:
    """Its only image; None for any other number."""
    images = record.get("images") or record.get("image")
    if isinstance(images, (list, tuple)):
        return images[0] if len(images) == 1 else None
    return images or None


def _key(record: Mapping[str, Any]) -> str:
    image = _image(record)
    return digest(image) if isinstance(image, Image.Image) else str(image)


def _without_image(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("image", "images")}


def _words(record: Mapping[str, Any]) -> set[str]:
    """Of its answers, in lower case; without function words and what is shorter than three letters."""
    turns = record.get("conversations", record.get("messages")) or []
    answers = [turn for turn in turns if ROLES.get(turn.get("from", turn.get("role"))) == "assistant"]
    contents = [turn.get("value", turn.get("content")) for turn in answers]
    texts = [content if isinstance(content, str) else " ".join(part.get("text", "") for part in content) for content in contents]
    found = {word.lower() for text in texts for word in re.findall(r"\w+", text)}
    return {word for word in found if len(word) > 2 and word_class(word) != "function"}
