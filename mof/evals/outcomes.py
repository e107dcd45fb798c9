"""What one run measured, read from what it wrote: figures with the units they are made of, shares by pattern, deviations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mof.evals.intervals import Counts, Figure, Given, Tally
from mof.evals.mmvp import LABELS
from mof.evals.run import FORMAT

# Shapes: U = units (pairs, photos, captions), S = POPE's strategies.

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One run of one model on one benchmark."""

    file: Path
    benchmark: str
    model: str
    seed: int | None
    basis: str
    """What it was measured on, such as "150 pairs"."""
    figures: dict[str, Figure]
    """By the keys of `mof.evals.report.MEASURES`, or "task metric" of lmms-eval."""
    deviations: list[str]
    patterns: dict[str, float] = field(default_factory=dict)
    """Share of right pairs by pattern, as the questions spell it."""


def read_outcome(place: str | Path) -> Outcome:
    """Of a folder that `mof eval` wrote, or a .json that `mof probe mmvp-vlm` wrote.

    Raises:
        ValueError: for anything else, a run that has not ended, or files that contradict each other.
    """
    place = Path(place)
    file = place / "result.json" if place.is_dir() else place
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document.get("format", FORMAT) != FORMAT:  # older releases wrote none
            raise ValueError(f"format {document['format']!r}, this version of mof-vig reads {FORMAT}")
        outcome = _READERS[document["benchmark"]](file, document)
    except OSError as error:
        raise ValueError(
            f"{error.filename}: cannot be read ({error.strerror}); expected a folder that `mof eval` wrote to its end, or a .json "
            "of `mof probe mmvp-vlm`"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} is no result of `mof eval` or `mof probe mmvp-vlm` ({type(error).__name__}: {error})") from None
    _check(file, document, outcome)
    return outcome


def _answers(result: Path) -> list[Row]:
    """Those beside a result.json."""
    return [json.loads(line) for line in result.with_name("answers.jsonl").read_text(encoding="utf-8").splitlines()]


def _outcome(file: Path, document: Row, basis: str, figures: dict[str, Figure], patterns: dict[str, float] | None = None) -> Outcome:
    notes = document["deviations"]
    if not figures:
        raise ValueError("no figures: nothing could be measured")
    if not isinstance(notes, list) or any(isinstance(one, Tally) and not one.units for one in figures.values()):
        raise ValueError("no answers, or no list of deviations")
    return Outcome(file, document["benchmark"], str(document["model"]), document["seed"], basis, figures, notes, patterns or {})


def _mmvp(file: Path, document: Row) -> Outcome:
    rows = _answers(file)
    pairs = list(zip(rows[0::2], rows[1::2], strict=True))
    units = tuple(f"{a['prompt']} {a['labels']} / {b['prompt']} {b['labels']}" for a, b in pairs)
    figures: dict[str, Figure] = {}
    for way in document["scores"]:
        name = "mmvp" if way == document["matched_by"] else f"mmvp {way}"
        for labels in LABELS:
            right = [tuple(bool(one["right"][way][labels]) for one in pair) for pair in pairs]
            suffix = "" if labels == LABELS[0] else f" {labels}"
            figures[f"{name} pairs{suffix}"] = Tally(units, np.array([(all(two), 1) for two in right], float))  # [U, 2]
            figures[f"{name} questions{suffix}"] = Tally(units, np.array([(sum(two), 2) for two in right], float))  # [U, 2]
    by_pattern = document["scores"][document["matched_by"]][LABELS[0]]["by_pattern"]
    return _outcome(file, document, f"{len(pairs)} pairs", figures, {name: one["pair_accuracy"] for name, one in by_pattern.items()})


def _mmvp_vlm(file: Path, document: Row) -> Outcome:
    rows = document["pairs"]
    units = tuple(f"{row['type']}: {row['ids']} {row['statements']}" for row in rows)
    likeness = sum(row["image_similarity"] for row in rows) / len(rows)
    figures: dict[str, Figure] = {"mmvp-vlm likeness": Given(likeness)}
    if "average" in document:
        figures["mmvp-vlm pairs"] = Tally(units, np.array([(row["right"], 1) for row in rows], float))  # [U, 2]
    owner = {"model": document["encoder"], "seed": None}
    return _outcome(file, document | owner, f"{len(rows)} pairs of {document['folder']}", figures, document.get("by_pattern"))


def _pope(file: Path, document: Row) -> Outcome:
    """Units are photos: each is asked about six times per strategy."""
    rows = _answers(file)
    strategies = list(dict.fromkeys(row["id"].partition("/")[0] for row in rows))
    photos: dict[str, list[Row]] = {}
    for row in rows:
        photos.setdefault(row["image"], []).append(row)
    counts = np.zeros((len(photos), len(strategies), 4))  # [U, S, 4]: said yes and it is, yes but not, no and not, no but it is
    for photo, asked in enumerate(photos.values()):
        for row in asked:
            kind = (0 if row["present"] else 1) if row["yes"] else (3 if row["present"] else 2)
            counts[photo, strategies.index(row["id"].partition("/")[0]), kind] += 1
    units = tuple(f"{name}: {[(one['id'], one['text'], one['present']) for one in asked]}" for name, asked in photos.items())
    flat = counts.reshape(len(photos), -1)  # [U, S*4]
    figures: dict[str, Figure] = {f"pope {name}": Tally(units, flat, _by_strategy(of)) for name, of in _POPE_STATISTICS.items()}
    return _outcome(file, document, f"{len(rows)} questions about {len(photos)} photos ({', '.join(strategies)})", figures)


def _ratio(above: Counts, below: Counts, empty: float) -> Counts:
    return np.where(below > 0, above / np.maximum(below, 1), empty)  # [...]


_POPE_STATISTICS: dict[str, Callable[[Counts, Counts, Counts, Counts], Counts]] = {
    "accuracy": lambda hit, false, rejected, missed: _ratio(hit + rejected, hit + false + rejected + missed, math.nan),
    "f1": lambda hit, false, rejected, missed: _ratio(2 * hit, 2 * hit + false + missed, 0.0),
    "yes": lambda hit, false, rejected, missed: _ratio(hit + false, hit + false + rejected + missed, math.nan),
}


def _by_strategy(of: Callable[[Counts, Counts, Counts, Counts], Counts]) -> Callable[[Counts], Counts]:
    """The mean over the strategies of a figure of their four counts."""

    def statistic(counts: Counts) -> Counts:
        by = counts.reshape(*counts.shape[:-1], -1, 4)  # [..., S, 4]
        return of(by[..., 0], by[..., 1], by[..., 2], by[..., 3]).mean(axis=-1)  # [...]

    return statistic


def _chair(file: Path, document: Row) -> Outcome:
    rows = _answers(file)
    units = tuple(f"{row['image_id']}: {row['in_image']}" for row in rows)
    wrong, mentions = ([len(row[name]) for row in rows] for name in ("hallucinated", "mentions"))
    figures: dict[str, Figure] = {
        "chair s": Tally(units, np.array([(n > 0, 1) for n in wrong], float)),  # [U, 2]
        "chair length": Given(document["mean_length"]),
    }
    if sum(mentions):
        figures["chair i"] = Tally(units, np.array(list(zip(wrong, mentions, strict=True)), float))  # [U, 2]
    return _outcome(file, document, f"{len(rows)} captions", figures)


def _lmms(file: Path, document: Row) -> Outcome:
    figures: dict[str, Figure] = {f"{one['task']} {one['metric']}": Given(one["value"], one["error"]) for one in document["figures"]}
    counts = {one["task"]: one["samples"] for one in document["figures"]}
    return _outcome(file, document, ", ".join(f"{task}: {count} questions" for task, count in counts.items()), figures)


_READERS: dict[str, Callable[[Path, Row], Outcome]] = {
    "mmvp": _mmvp,
    "mmvp-vlm": _mmvp_vlm,
    "pope": _pope,
    "chair": _chair,
    "lmms-eval": _lmms,
}
_HEADLINES = {"mmvp pairs": "pair_accuracy", "mmvp-vlm pairs": "average", "pope accuracy": "accuracy", "chair s": "chair_s"}


def _check(file: Path, document: Row, outcome: Outcome) -> None:
    for key, name in _HEADLINES.items():
        if key in outcome.figures and not math.isclose(outcome.figures[key].value, document[name], abs_tol=1e-9):
            raise ValueError(
                f"{file}: {name} is {document[name]}, but its answers make {outcome.figures[key].value}: the files are of different runs"
            )
