"""The calibration measures whether the VIG of a model tells right images from swapped images.

For this, a few records are scored with the images of other records too. No labels are needed. The result is in the manifest of the
scores, and `diagnosis` says it in words.
"""

from __future__ import annotations

import heapq
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mof.data.records import RecordError, digest, images_of, to_record
from mof.data.rows import Row
from vig.scoring.score_table import Score
from vig.words import answer_words, word_class

SHARE, FEWEST, MOST = 0.01, 50, 1000  # share and number of the records that are scored with swapped images too
NO_GAIN = 0.6
"""Limit of AUROC. In the miniature, VIG tells right from swapped images with AUROC .50 before stage 1, .70 after 2,000 captions and .72
after 8,000 captions, on records with 40 % ungrounded answers (.75 and .79 on records without noise). Answers that no image supports lower
it, so a high limit would tell noise in the records from a bad scorer no better than chance."""
FEW, TOO_MANY = 0.25, 0.75
"""Limits of the share of records that look as if their image was swapped (`calibration`, "alike"). In the miniature it was .41 where 36 %
of the records with an image were ungrounded, and selection gained 12 to 26 points of pairs; it was .11 on clean records, where selection
lost 39. With 50 records, the standard deviation of this estimate is .12 and .06. A scorer that reads nothing finds all
records alike (.99 after a stage 1 on swapped images). With mixed noise it was .42, but VIG did not find these: a selection warns."""
ENOUGH = 30
"""The smallest number of records for a verdict. With fewer, the standard deviation of "alike" is .15 or more where it is .41."""


class Sample:
    """A sample holds the records whose ids have the lowest checksums: about 1 % of the records with images, from 50 to 1,000.

    Every process and every resumed run takes the same records.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str, Row]] = []  # the highest checksum first; the unique count avoids comparing records
        self._seen = 0

    def add(self, id: str, raw: Row) -> None:
        """Offer a record to the sample, which keeps it if its checksum is low enough."""
        self._seen += 1
        key, size = -zlib.crc32(id.encode(errors="replace")), min(max(FEWEST, round(SHARE * self._seen)), MOST)
        if (len(self._heap) < size or key > self._heap[0][0]) and images_of(raw):
            heapq.heappush(self._heap, (key, self._seen, id, raw))
            while len(self._heap) > size:
                heapq.heappop(self._heap)

    @property
    def records(self) -> list[Row]:
        """Return the records of the sample, in the order in which they were offered."""
        return [raw for _, _, _, raw in sorted(self._heap, key=lambda entry: entry[1])]

    @property
    def digest(self) -> str:
        """Return a digest of the ids of the sample's records."""
        return digest(sorted(id for _, _, id, _ in self._heap))


def with_swapped_images(raws: Iterable[Row], image_folder: str | os.PathLike[str] | None) -> list[dict[str, Any]]:
    """Return the records with swapped images, which come from the next record with the same number of images but other images.

    Unreadable records are left out.
    """
    groups: dict[int, list[tuple[dict[str, Any], str]]] = {}  # number of images -> record, digest of its images
    for raw in raws:
        try:
            record = to_record(raw, image_folder)
        except RecordError:  # this record has no score either
            continue
        images = images_of(raw)  # as they are named, since the folder is put in front when the row is scored
        row = {"id": record.id, "messages": record.messages, "images": images}
        groups.setdefault(len(images), []).append((row, digest(images)))
    swapped = []
    for group in groups.values():
        for place, (row, images_digest) in enumerate(group):
            donors = (donor["images"] for donor, other_digest in group[place + 1 :] + group[:place] if other_digest != images_digest)
            if (other := next(donors, None)) is not None:
                swapped.append({**row, "images": other})
    return swapped


def calibration(right: Sequence[Score], swapped: Sequence[Score]) -> dict[str, Any]:
    """Measure how well VIG tells right from swapped images.

    Returns:
        A JSON-able dict. "records": number of records. "auroc": the chance that VIG is higher for a record with its own image than for
        a record with a swapped image; None for fewer than two records. "alike": the estimated share of records that look as if their
        image was swapped. It is too high for the share of unsupported answers where good answers fit other images too, and too low where
        unsupported answers have a high VIG by accident. "classes": the measure "auroc" for the words of each class, with the number of
        words, and whether the model "reads" this class (Mann-Whitney, p < .05).
    """
    auroc, _ = _higher([score.vig for score in right], [score.vig for score in swapped])
    words: dict[str, tuple[list[float], list[float]]] = {}
    for side, scores in enumerate((right, swapped)):
        for word in (word for score in scores for turn in answer_words(score) for word in turn):
            kind = word_class(word.text)
            if kind is not None and kind != "function":
                words.setdefault(kind, ([], []))[side].append(word.vig)
    classes = {}
    for kind, sides in sorted(words.items()):
        class_auroc, p = _higher(*sides)
        classes[kind] = {"auroc": class_auroc, "words": len(sides[0]), "reads": p < 0.05}
    result = {"records": len(right), "auroc": auroc, "alike": _alike(right, swapped), "classes": classes}
    gains = [[_gain(score) for score in scores if score.token_loss is not None] for scores in (right, swapped)]
    return result | ({"gain": _higher(*gains)[0]} if all(gains) else {})


def _alike(right: Sequence[Score], swapped: Sequence[Score]) -> float | None:
    """Return how many times more rarely a VIG lies in the lower half of the swapped records' VIG when the image is right, at most 1.

    If a share of the answers fits no image better than another image, this share of the records has the distribution of swapped records.
    """
    if not swapped:
        return None
    sides = [np.array([score.vig for score in scores]) for scores in (right, swapped)]
    middle = np.median(sides[1])
    below, half = (np.mean(vig < middle) + np.mean(vig == middle) / 2 for vig in sides)  # half is 1/2 unless many values are equal
    return min(1.0, float(below / half))


def _gain(score: Score) -> float:
    """Return the mean rise of the probability of the answer tokens, which words that the model cannot predict hardly change."""
    assert score.token_loss is not None and score.null_token_loss is not None
    return float((np.exp(-score.token_loss) - np.exp(-score.null_token_loss)).mean())


def _higher(right: Sequence[float], swapped: Sequence[float]) -> tuple[float | None, float]:
    """Return the chance that a value of `right` is higher than a value of `swapped`, and the p-value (Mann-Whitney, one-sided)."""
    from scipy.stats import mannwhitneyu  # slow to import

    if min(len(right), len(swapped)) < 2:
        return None, 1.0
    test = mannwhitneyu(right, swapped, alternative="greater")
    return float(test.statistic) / (len(right) * len(swapped)), float(test.pvalue)


def diagnosis(result: Mapping[str, Any]) -> str:
    """Return a text that says whether the scores are fit for a selection, or "" without a calibration.

    Args:
        result: the return value of `calibration`, as in the manifest of the scores.
    """
    if not result:
        return ""
    auroc = result["auroc"]
    if auroc is None:
        return "Not calibrated: fewer than two records could be scored with the image of another record too."
    reads = {flag: ", ".join(kind for kind, row in result["classes"].items() if row["reads"] is flag) or "none" for flag in (True, False)}
    gain = f", {result['gain']:.2f} by `gain`" if result.get("gain") is not None else ""
    return (
        f"AUROC {auroc:.2f}{gain} of right against swapped images ({result['records']} records); word classes it reads: {reads[True]}; "
        f"does not read: {reads[False]}. Selection is {_verdict(result)} (the limits are from a miniature study)."
    )


def _verdict(result: Mapping[str, Any]) -> str:
    if result["records"] < ENOUGH:
        return f"of uncertain use: {result['records']} records are too few for a verdict"
    alike = result.get("alike")  # calibrations of earlier versions lack it
    read = any(row["reads"] for row in result["classes"].values())  # AUROC alone varies in small samples
    if result["auroc"] < NO_GAIN or not read or (alike is not None and alike > TOO_MANY):
        return "expected to gain nothing or to hurt: align the model longer and score again"
    if alike is None:
        return "of uncertain use; --floor is safer"
    looks = f"about {alike:.0%} of the records look as if they had another image"
    if alike < FEW:
        return f"expected to hurt: only {looks}, so there is little to drop, and all records teach. Train on all of them"
    return f"expected to help if `mof vig select` does not warn: {looks}, such as answers that were written without looking"
