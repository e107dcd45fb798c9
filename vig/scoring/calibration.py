"""The calibration measures whether the VIG of a model tells right images from swapped images.

For this, a few records are scored with the images of other records too. No labels are needed. The result is in the manifest of the
scores, and `diagnosis` says it in words.
"""

from __future__ import annotations

import heapq
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mof.data.records import RecordError, digest, images_of, to_record
from mof.data.rows import Row
from vig.scoring.score_table import Score
from vig.words import answer_words, word_class

SHARE, FEWEST, MOST = 0.01, 100, 1000  # share and number of the records that are scored with swapped images too
NO_GAIN = 0.6
"""Limit of AUROC. In the miniature, VIG tells right from swapped images with AUROC .50 before stage 1, .70 after 2,000 captions and .72
after 8,000 captions, on records with 40 % ungrounded answers (.75 and .79 on records without noise). Answers that no image supports lower
it, so a high limit would tell noise in the records from a bad scorer no better than chance."""
FEW, TOO_MANY = 0.25, 0.75
"""Limits of the share of records that look as if their image was swapped (`calibration`, "alike"). In the miniature (seed 0, 160 swapped
records) it was .05, .22, .40 and .61 where 0, 18, 36 and 53 % of the records with an image were ungrounded; whole records with VIG >= 0
gained -6, 5, 11 and 22 points of pairs there. With 100 swapped records, the standard deviation of this estimate is .01, .02, .05 and .05.
A scorer that reads nothing finds all records alike. With mixed noise it was .21, too. On clean records it was .26 and .38 for scorers whose
adapters had been disturbed: a scorer that reads little cannot be told from unsupported answers without a look at the records."""
ENOUGH = 30
"""The smallest number of records for a verdict, and of words for saying that a class is not read."""
CHANCE, UNREAD = 0.01, 0.55
"""Limits of a class of words: of p if the model reads it, so that a scorer that reads nothing rarely reads one of six classes by chance,
and of AUROC if the model does not read it. All other classes are uncertain."""


class Sample:
    """A sample holds the records whose ids have the lowest checksums: about 1 % of all records, from 100 to 1,000, if they have images.

    Every process and every resumed run takes the same records, because all read them in the same order.
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


def calibration(right: Sequence[Score], swapped: Sequence[Score], every: NDArray[np.floating] | None = None) -> dict[str, Any]:
    """Measure how well VIG tells right from swapped images.

    Args:
        right: the scores of a sample of the records.
        swapped: the scores of the same records with swapped images, in the same order.
        every: [N] the VIG of all records with their own images, if there are more than in `right`.

    Returns:
        A JSON-able dict. "records": number of records in the sample. "auroc": the chance that VIG is higher for a record with its own
        image than for a record with a swapped image, and "error", its standard error; None for fewer than two records. "alike": the
        estimated share of all records that look as if their image was swapped, and "alike_interval", its 95 % confidence interval. The
        estimate is too high for the share of unsupported answers where the model reads little or good answers fit other images too, and
        too low where unsupported answers have a high VIG by accident. "classes": the measure "auroc" for the words of each class, with
        the number of words, and whether the model "reads" this class (Mann-Whitney, p < .01).
    """
    vigs = [np.array([score.vig for score in scores]) for scores in (right, swapped)]
    auroc, _ = _higher(*vigs)
    words: dict[str, tuple[list[float], list[float]]] = {}
    for side, scores in enumerate((right, swapped)):
        for word in (word for score in scores for turn in answer_words(score) for word in turn):
            kind = word_class(word.text)
            if kind is not None and kind != "function":
                words.setdefault(kind, ([], []))[side].append(word.vig)
    classes = {}
    for kind, sides in sorted(words.items()):
        class_auroc, p = _higher(*sides)
        classes[kind] = {"auroc": class_auroc, "words": len(sides[0]), "reads": p < CHANCE}
    result = {"records": len(right), "auroc": auroc, "error": _error(*vigs), **_alike(vigs[0] if every is None else every, vigs[1])}
    gains = [[_gain(score) for score in scores if score.token_loss is not None] for scores in (right, swapped)]
    return result | {"classes": classes} | ({"gain": _higher(*gains)[0]} if all(gains) else {})


def _error(right: NDArray[np.floating], swapped: NDArray[np.floating]) -> float | None:
    """Return the standard error of AUROC (DeLong), as if the sides were different records; None for fewer than two records."""
    if len(right) < 2:
        return None
    return math.sqrt((places(right, swapped).var(ddof=1) + places(swapped, right).var(ddof=1)) / len(right))


def places(values: NDArray[np.floating], others: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return, for each value, the share of the others that are lower; equal values count half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(ordered))


def _alike(right: NDArray[np.floating], swapped: NDArray[np.floating]) -> dict[str, Any]:
    """Return how many times more rarely a VIG lies in the lower half of the swapped records' VIG when the image is right, at most 1.

    If a share of the answers fits no image better than another image, this share of the records has the distribution of swapped records.
    The interval is the interval of the swapped records' median.
    """
    if not len(swapped):
        return {"alike": None}
    margin = 0.98 / math.sqrt(len(swapped))  # 1.96 standard deviations of the share below the median
    middles = np.quantile(swapped, np.clip([0.5, 0.5 - margin, 0.5 + margin], 0, 1))
    sides = [[np.mean(vig < middle) + np.mean(vig == middle) / 2 for middle in middles] for vig in (right, swapped)]
    half = sides[1][0]  # 1/2 unless many values are equal
    share, low, high = (min(1.0, float(below / half)) for below in sides[0])
    return {"alike": share, "alike_interval": [low, high]}


def _gain(score: Score) -> float:
    """Return the mean rise of the probability of the answer tokens, which words that the model cannot predict hardly change."""
    assert score.token_loss is not None and score.null_token_loss is not None
    return float((np.exp(-score.token_loss) - np.exp(-score.null_token_loss)).mean())


def _higher(right: Any, swapped: Any) -> tuple[float | None, float]:
    """Return the chance that a value of `right` is higher than a value of `swapped`, and the p-value (Mann-Whitney, one-sided)."""
    from scipy.stats import mannwhitneyu  # slow to import

    if min(len(right), len(swapped)) < 2:
        return None, 1.0
    test = mannwhitneyu(right, swapped, alternative="greater")
    return float(test.statistic) / (len(right) * len(swapped)), float(test.pvalue)


def diagnosis(result: Mapping[str, Any]) -> str:
    """Return a text of three lines that says whether the scores are fit for a selection, or "" without a calibration.

    Args:
        result: the return value of `calibration`, as in the manifest of the scores.
    """
    if not result:
        return ""
    auroc = result["auroc"]
    if auroc is None:
        return "Not calibrated: fewer than two records could be scored with the image of another record too."
    error = f" ± {1.96 * result['error']:.2f}" if result.get("error") is not None else ""  # calibrations of earlier versions lack it
    gain = f", {result['gain']:.2f} by `gain`" if result.get("gain") is not None else ""
    compared = f"AUROC {auroc:.2f}{error}{gain} of right against swapped images ({result['records']} records)."
    return f"{compared}\n{_classes(result['classes'])}.\n{verdict(result)}"


def _classes(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a text that names the classes of words that the model reads, with their AUROC."""
    if not classes:
        return "The answers hold no word of the (English) word classes"

    names: dict[str, list[str]] = {"reads": [], "unread": [], "uncertain": []}
    for kind, row in classes.items():
        silent = row["words"] >= ENOUGH and row["auroc"] < UNREAD
        group = "reads" if row["reads"] else "unread" if silent else "uncertain"
        names[group].append(kind if row["auroc"] is None else f"{kind} {row['auroc']:.2f}")
    reads, unread, uncertain = (", ".join(group) for group in names.values())
    more = f"; uncertain: {uncertain}" if uncertain else ""
    return f"Word classes it reads: {reads or 'none'}; does not read, or the question tells: {unread or 'none'}{more}"


def verdict(result: Mapping[str, Any]) -> str:
    """Return a sentence that says whether a selection is expected to help, and what to do; "" without a calibration.

    Args:
        result: the return value of `calibration`, as in the manifest of the scores.
    """
    if not result or result["auroc"] is None:
        return ""
    return f"Selection is {_expected(result)} (the limits are from a miniature study)."


def _expected(result: Mapping[str, Any]) -> str:
    if result["records"] < ENOUGH:
        return f"of uncertain use: {result['records']} records are too few for a verdict"
    alike = result.get("alike")  # calibrations of earlier versions lack it, and "error"
    if result.get("error") is None:
        read = any(row["reads"] for row in result["classes"].values())
    else:
        read = result["auroc"] - 1.96 * result["error"] > 0.5
    if result["auroc"] < NO_GAIN or not read or (alike is not None and alike > TOO_MANY):
        unless = ", unless the answers of most records are wrong (look at the lowest VIG in `mof vig report`)" if read else ""
        return f"expected to gain nothing or to hurt: align the model longer and score again{unless}"
    if alike is None:
        return "of uncertain use; --floor is safer"
    low, high = result.get("alike_interval") or [alike, alike]
    looks = f"about {alike:.0%} ({low:.0%} to {high:.0%}) of the records look as if they had another image"
    if low < FEW < high:
        return (
            f"of uncertain use with --keep: {looks}, and selection by --keep hurt below {FEW:.0%} and helped above. "
            "--floor --token-threshold none is safer"
        )
    if alike < FEW:
        return (
            f"expected to hurt with --keep: only {looks}, so it would drop records that teach. Train on all of them; "
            "--floor --token-threshold none changes little"
        )
    return (
        f"expected to help where `mof vig select` does not warn: {looks}. Read those with the lowest VIG (`mof vig report`). If their "
        "answers are wrong, drop them, safest by --floor --token-threshold none; if they are right, the model reads too little: align it "
        "longer"
    )
