"""The page of `mof vig report`: this module gathers its contents, and `page.html.jinja` lays them out."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from encoders.pages import colour_scale, signed, write_page
from encoders.pages.charts import Bar, column_edges, histogram, interval_bars, to_svg
from encoders.progress import tracked
from mof.data.record_files import UnreadableRow
from mof.data.rows import RawRecord, rows_by_id
from vig.report.null_comparison import compare_nulls, null_name, reference_of
from vig.report.samples import SampleReader
from vig.scoring.calibration import diagnosis
from vig.scoring.score_table import ENCODER, Score
from vig.scoring.scores import Scores
from vig.selection.selected import Selection
from vig.words import Mean, answer_words, can_tag, parts_of_speech, word_class

if TYPE_CHECKING:
    from vig.report.explanation import Explanation

# Shapes: N = values, A = answer tokens of all records, B = columns of a histogram.

MOST_SOURCES = 12  # the largest sources have a histogram each
EXPLAINED = 3  # records of either end whose question the model answers
WORD_RECORDS = 10_000  # the words of more records would take minutes and change no digit


def write_report(
    file: str | os.PathLike[str],
    selection: Selection,
    records: Iterable[RawRecord],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    others: Sequence[Scores] = (),
    samples: int = 25,
    explain: Callable[[RawRecord], Explanation] | None = None,
    records_name: str | None = None,
    progress: bool = False,
) -> None:
    """Write one HTML file that needs no other file: the distribution of VIG, kinds of words, samples, null images and sparsity.

    The same scores, records and images give the same bytes.

    Args:
        selection: a selection from the scores that are shown; the page also shows its threshold and sparsity.
        records: the records that were scored; others may be among them.
        image_folder: the folder of the records' relative image paths; None leaves the images out, and the page says so.
        others: scores of the same model and records with other null images.
        samples: number of records that are shown from either end. The page searches them for words.
        explain: explains the model's own answer to a record's first question; it is called for the outermost three records of either
            end.
        records_name: the records' file, which the page then names.

    Raises:
        ValueError: for records that are not the records of the scores, or other scores that cannot be compared.
    """
    scores = selection.scores
    lowest, highest = _ends(scores, samples)
    wanted = shown_ids(scores, samples)
    by_id = {id: row for id, row in rows_by_id(records) if id in wanted and not isinstance(row, UnreadableRow)}
    reader = SampleReader(selection, by_id, scores.manifest["identity"], image_folder)
    shown = {"highest": [reader.read(score) for score in highest], "lowest": [reader.read(score) for score in lowest]}
    runs = [scores, *others]
    nulls = compare_nulls(runs) if others else []
    asked = [] if explain is None else [by_id[score.id] for score in (*highest[:EXPLAINED], *lowest[:EXPLAINED]) if score.id in by_id]
    answers = [explain(raw) for raw in asked] if explain is not None else []
    threshold = selection.threshold if selection.threshold is not None and math.isfinite(selection.threshold) else None
    token_vig = scores.token_vig  # [A]
    sources = _by_source(selection)
    write_page(
        Path(file),
        Path(__file__).with_name("page.html.jinja"),
        title=f"Visual information gain of {len(scores):,} records",
        identity=scores.manifest["identity"],
        failures=scores.failures,
        complete=scores.manifest["complete"],
        summary=selection.summary(),
        threshold=threshold,
        tokens=_tokens(selection, threshold),
        sides=_sides(selection, threshold),
        diagnosis=diagnosis(scores.manifest.get("calibration", {})),
        about={"model": "", **scores.manifest.get("about", {}), "records": records_name or ""},
        every=Mean.of(scores.vig),
        harmed=int((scores.vig < 0).sum()),
        means={source: Mean.of(values) for source, values in sources.items()},
        histogram=_histogram(scores.vig, scores.vig, threshold, "record"),
        token_histogram=_histogram(token_vig, token_vig, threshold, "token", log=True),
        token_mean=Mean.of(token_vig),
        encoders=_by_encoder(scores),
        source_histograms=_source_histograms(scores.vig, sources, threshold),
        words=_words_of(_evenly(scores, WORD_RECORDS), progress),
        samples=shown,
        has_images=image_folder is not None,
        unread=sum(picture.shown is None for group in shown.values() for sample in group for picture in sample.pictures),
        token_scale=colour_scale(token_vig),
        answers=answers,
        answer_scale=colour_scale([token.contrast for shown in answers for answer in shown.answers for token in answer.tokens]),
        nulls=nulls,
        null_reference=null_name(reference_of(runs)),
    )


def shown_ids(scores: Scores, samples: int) -> set[str]:
    """Return the ids of the records that the page shows. It needs no other records."""
    return {score.id for end in _ends(scores, samples) for score in end}


def _tokens(selection: Selection, threshold: float | None) -> dict[str, int] | None:
    """Return the number of tokens that "reach" the threshold, that reach it but are "lost", and that are kept "below" it.

    The result is None without a threshold.
    """
    if threshold is None:
        return None
    reach, kept = selection.scores.token_vig >= np.float32(threshold), selection.token_masks.flat  # [A], [A]
    both = int((reach & kept).sum())
    return {"reach": int(reach.sum()), "lost": int(reach.sum()) - both, "below": int(kept.sum()) - both}


def _sides(selection: Selection, threshold: float | None) -> list[dict[str, float]]:
    """Return the number of records, their tokens and their mean VIG on either side of the threshold, the upper side first."""
    if threshold is None:
        return []
    scores = selection.scores
    above, lengths = scores.vig >= np.float32(threshold), np.diff(scores.bounds)  # [N], [N]
    return [
        {"records": int(side.sum()), "tokens": int(lengths[side].sum()), "mean": float(scores.vig[side].mean()) if side.any() else 0.0}
        for side in (above, ~above)
    ]


def _by_encoder(scores: Scores) -> dict[str, Mean]:
    """Return encoder -> mean VIG of this encoder alone over all answer tokens, and "the rest" of VIG; {} for scores without them."""
    columns = {name: scores.column(ENCODER + name) for name in scores.encoders}
    if not columns:
        return {}
    columns["the rest"] = scores.token_vig - sum(columns.values())
    return {name: Mean.of(values) for name, values in columns.items()}


def _ends(scores: Scores, count: int) -> tuple[list[Score], list[Score]]:
    """Return `count` scores from each end, the outermost first: the lowest and the highest. No record is in both lists."""
    low = min(count, len(scores) // 2)

    def ranked() -> Iterator[tuple[float, str, int]]:
        return zip(scores.vig.tolist(), scores.ids, range(len(scores)), strict=True)

    ends = heapq.nsmallest(low, ranked()), heapq.nlargest(min(count, len(scores) - low), ranked())
    lowest, highest = (scores.at([place for _, _, place in end]) for end in ends)
    return lowest, highest


def _evenly(scores: Scores, count: int) -> list[Score]:
    """Return at most `count` scores, evenly spread over all."""
    return scores.at(np.linspace(0, len(scores) - 1, min(count, len(scores))).round().astype(int).tolist())


def _by_source(selection: Selection) -> dict[str, NDArray[np.float32]]:
    """Return source -> sample VIG, the largest source first. Records without a source are a group, too."""
    names, codes = selection.source_codes
    groups = {name: selection.scores.vig[codes == code] for code, name in enumerate(names)}
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))


# --- charts
def _source_histograms(
    every: NDArray[np.floating], sources: Mapping[str, NDArray[np.floating]], threshold: float | None
) -> dict[str, Markup]:
    """Return histograms of the largest sources on the axis of all records. There are none for a single source."""
    largest = list(sources.items())[:MOST_SOURCES] if len(sources) > 1 else []
    return {source: _histogram(values, every, threshold, "record", height=170) for source, values in largest}


def _histogram(
    values: NDArray[np.floating], every: NDArray[np.floating], threshold: float | None, kind: str, *, log: bool = False, height: int = 250
) -> Markup:
    """Return a histogram of the values, on an axis from and to 0 or the 0.1 % and 99.9 % quantiles of `every`."""
    low, high = np.quantile(every, [0.001, 0.999]).tolist()
    low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.02 * (high - low)
    edges = column_edges(low - margin, high + margin, threshold)  # [B + 1]
    note = "" if threshold is None else f"threshold {signed(threshold)}: {float((values >= threshold).mean()):.1%} reach it"
    drawn = histogram(values, edges, label=f"VIG of a {kind}, nats", unit=f"{kind}s", cut=threshold, note=note, log=log, height=height)
    return to_svg(drawn, f"VIG of a {kind}: mean {signed(float(values.mean()))} nats")


@dataclass(frozen=True)
class Words:
    """Words holds charts of the mean VIG by kind of word."""

    records: int
    words: int
    classes: Markup | None
    """A chart; None where no word is in a list."""
    parts: Markup | None
    """A chart of the parts of speech; None without a tagger."""
    can_tag: bool


def _words_of(scores: Sequence[Score], progress: bool) -> Words:
    classes: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    count, tags = 0, can_tag()
    for score in tracked(scores, "records", shown=progress):
        for turn in answer_words(score):
            names = [word.text for word in turn]
            count += len(names)
            for word, part in zip(turn, parts_of_speech(names) if tags else [None] * len(names), strict=True):
                for groups, kind in ((classes, word_class(word.text)), (parts, part)):
                    if kind is not None:
                        groups.setdefault(kind, []).append(word.vig)
    return Words(len(scores), count, _bars(classes), _bars(parts), tags)


def _bars(groups: Mapping[str, Sequence[float]]) -> Markup | None:
    """Return a chart of the groups' means, the highest first, or None without a group."""
    means = sorted(((kind, Mean.of(values)) for kind, values in groups.items()), key=lambda row: (-row[1].mean, row[0]))
    bars = [Bar(kind, mean.mean, mean.interval, f"{signed(mean.mean)}, {mean.n:,} words") for kind, mean in means]
    return to_svg(interval_bars(bars, "mean VIG of a word, nats"), "mean VIG by kind of word") if bars else None
