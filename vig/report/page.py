"""The page: what it shows is gathered here, how it looks is said in `templates/`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.progress import track

from mof.data.rows import RawRecord, UnreadableRow, id_of, rows
from vig.answer_words import answer_words
from vig.means import Mean
from vig.report.charts import BarChart, Histogram, axis_of, bar_chart, histogram
from vig.report.null_comparison import compare_nulls, null_name, reference_of
from vig.report.parts_of_speech import can_tag, parts_of_speech
from vig.report.samples import SampleReader
from vig.scoring.scores import Score, Scores
from vig.selection.sources import NO_SOURCE
from vig.selection.thresholds import Selection
from vig.word_classes import word_class

MOST_SOURCES = 12  # with a histogram of their own
WORD_RECORDS = 10_000  # whose words are looked at; more would take minutes and change no digit


def write_report(
    file: str | os.PathLike[str],
    selection: Selection,
    records: Iterable[RawRecord],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    others: Sequence[Scores] = (),
    samples: int = 8,
    progress: bool = False,
) -> None:
    """Write one HTML file that needs no other: the distribution of VIG, kinds of words, samples, null images and sparsity.

    The same scores, records and images give the same bytes.

    Args:
        selection: of the scores that are shown; its threshold and sparsity are on the page.
        records: those that were scored, and others if you like.
        image_folder: what the records' image paths are relative to; None leaves the images out, and the page says so.
        others: scores of the same model and records with other null images.
        samples: how many records are shown from either end.

    Raises:
        ValueError: for records that are not those of the scores, or other scores that cannot be compared.
    """
    scores = selection.scores
    by_id = {id_of(row): row for row in rows(records) if not isinstance(row, UnreadableRow)}
    reader = SampleReader(selection, by_id, scores.manifest["identity"], image_folder)
    lowest, highest = _ends(scores, samples)
    shown = {"highest": [reader.read(score) for score in highest], "lowest": [reader.read(score) for score in lowest]}
    words = _words_of(_evenly(scores, WORD_RECORDS), progress)
    runs = [scores, *others]
    page = _template().render(
        title=f"Visual information gain of {len(scores):,} records",
        identity=scores.manifest["identity"],
        failures=scores.failures,
        complete=scores.manifest["complete"],
        summary=selection.summary(),
        means=_means_by_source(selection),
        histograms=_histograms(selection),
        token_histogram=_token_histogram(selection),
        words=words,
        samples=shown,
        has_images=image_folder is not None,
        unread=sum(picture.shown is None for group in shown.values() for one in group for picture in one.pictures),
        token_scale=_token_scale(scores),
        nulls=compare_nulls(runs) if others else [],
        null_reference=null_name(reference_of(runs)),
    )
    path = Path(file)
    temporary = path.with_name(path.name + ".tmp")  # a page is whole or not there
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


@dataclass(frozen=True)
class Words:
    """Mean VIG by kind of word."""

    records: int
    words: int
    classes: BarChart | None
    """None where no word is in a list, or for parts of speech without a tagger."""
    parts: BarChart | None
    can_tag: bool


def _words_of(scores: Sequence[Score], progress: bool) -> Words:
    classes: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    count, tags = 0, can_tag()
    for score in track(scores, "words", console=Console(stderr=True), disable=not progress):
        for turn in answer_words(score):
            names = [word.text for word in turn]
            count += len(names)
            for word, part in zip(turn, parts_of_speech(names) if tags else [None] * len(names), strict=True):
                for found, kind in ((classes, word_class(word.text)), (parts, part)):
                    if kind is not None:
                        found.setdefault(kind, []).append(word.vig)
    return Words(len(scores), count, _bars(classes), _bars(parts), tags)


def _bars(groups: Mapping[str, Sequence[float]]) -> BarChart | None:
    return bar_chart({kind: Mean.of(values) for kind, values in groups.items()}) if groups else None


def _ends(scores: Scores, count: int) -> tuple[list[Score], list[Score]]:
    """The lowest from the bottom up and the highest from the top down; no record is both."""
    ordered = sorted(scores, key=lambda score: (score.vig, score.id))
    low = min(count, len(ordered) // 2)
    return ordered[:low], ordered[low:][::-1][:count]


def _evenly(scores: Scores, count: int) -> list[Score]:
    """At most `count` of them, from all over."""
    places = np.linspace(0, len(scores) - 1, min(count, len(scores))).round().astype(int)
    return [scores[int(place)] for place in places]


def _by_source(selection: Selection) -> dict[str, list[float]]:
    """Sample VIG of each source, the largest source first; one group of all where there are no sources."""
    groups: dict[str, list[float]] = {}
    for score in selection.scores:
        groups.setdefault(selection.sources.get(score.id, NO_SOURCE), []).append(score.vig)
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))


def _means_by_source(selection: Selection) -> dict[str, Mean]:
    return {source: Mean.of(values) for source, values in _by_source(selection).items()}


def _histograms(selection: Selection) -> list[Histogram]:
    """Of all records and, where there are several sources, of each, on one axis."""
    vig, threshold = selection.scores.vig, selection.threshold
    axis, groups = axis_of(vig, threshold), _by_source(selection)
    every = histogram("All records", vig, axis, threshold, "records")
    largest = list(groups.items())[:MOST_SOURCES] if len(groups) > 1 else []
    return [every, *(histogram(source, np.array(values), axis, threshold, "records") for source, values in largest)]


def _token_histogram(selection: Selection) -> Histogram:
    vig = np.concatenate([score.token_vig for score in selection.scores])  # [T]
    axis = axis_of(vig, selection.threshold)
    return histogram("All answer tokens", vig, axis, selection.threshold, "tokens", log=True)


def _token_scale(scores: Scores) -> float:
    """Nats at which the colour of a token is full: hardly one in fifty goes beyond."""
    vig = np.abs(np.concatenate([score.token_vig for score in scores]))  # [T]
    return max(0.1, round(float(np.quantile(vig, 0.98)), 1))


def _template() -> Any:
    folder = Path(__file__).parent / "templates"
    loader = FileSystemLoader(folder)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["nats"] = nats
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    return environment.get_template("page.html.jinja")


def nats(value: float | None, digits: int = 3) -> str:
    """With a sign that is as wide as a plus; a dash for none."""
    return "\u2013" if value is None else f"{value:+.{digits}f}".replace("-", "\u2212")
