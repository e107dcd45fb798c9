"""The outcome of a run, read from its files: figures with the units they are computed from, shares by pattern, deviations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from encoders.digests import DamagedError, damaged
from encoders.runs import read_sealed, read_sealed_lines
from mof.evals.intervals import Counts, Figure, Given, Tally
from mof.evals.mmvp import LABELS
from mof.evals.pope import RATES, outcome
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
    """The data that were measured on, such as "150 pairs"."""
    figures: dict[str, Figure]
    """Key of `mof.evals.measures.MEASURES` -> figure."""
    deviations: list[str]
    patterns: dict[str, float] = field(default_factory=dict)
    """Pattern, as the questions spell it -> share of right pairs."""
    wrong_pairs: list[tuple[Row, Row]] = field(default_factory=list)
    """For MMVP, the two rows of answers.jsonl for each pair that does not count."""


def read_outcome(place: str | Path) -> Outcome:
    """Read a folder that `mof eval` wrote, or a .json that `mof probe mmvp-vlm` wrote.

    Raises:
        DamagedError: for a file that was changed since, naming the file, and the line of an answer.
        ValueError: for any other place, a run that has not ended, or files that contradict each other.
    """
    place = Path(place)
    file = place / "result.json" if place.is_dir() else place
    try:
        document = read_sealed(file)
        if faults := damaged(file.parent, document.pop("files", {})):
            answers = file.with_name("answers.jsonl")
            if answers in faults and answers.is_file():
                _answers(file)  # names the line
            raise DamagedError("; ".join(faults.values()))
        if document.get("format", FORMAT) != FORMAT:  # older releases wrote none
            raise ValueError(f"format {document['format']!r}, this version of mof-vig reads {FORMAT}")
        measured = _READERS[document["benchmark"]](file, document)
    except OSError as error:
        raise ValueError(
            f"{error.filename}: cannot be read ({error.strerror}); expected a folder that `mof eval` wrote to its end, or a .json "
            "of `mof probe mmvp-vlm`"
        ) from None
    except DamagedError as error:
        raise DamagedError(f"{error}; the same `mof eval` or `mof probe` again writes it anew, and asks no question again") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} is no result of `mof eval` or `mof probe mmvp-vlm` ({type(error).__name__}: {error})") from None
    _check(file, document, measured)
    return measured


def _answers(result: Path) -> list[Row]:
    """Return the rows of the answers.jsonl beside a result.json."""
    return read_sealed_lines(result.with_name("answers.jsonl"))


def _outcome(file: Path, document: Row, basis: str, figures: dict[str, Figure], patterns: dict[str, float] | None = None) -> Outcome:
    notes = document["deviations"]
    if not figures:
        raise ValueError("no figures: nothing could be measured")
    if not isinstance(notes, list) or any(isinstance(figure, Tally) and not figure.units for figure in figures.values()):
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
            right = [tuple(bool(row["right"][way][labels]) for row in pair) for pair in pairs]
            suffix = "" if labels == LABELS[0] else f" {labels}"
            figures[f"{name} pairs{suffix}"] = Tally(units, np.array([(all(two), 1) for two in right], float))  # [U, 2]
            figures[f"{name} questions{suffix}"] = Tally(units, np.array([(sum(two), 2) for two in right], float))  # [U, 2]
    by_pattern = document["scores"][document["matched_by"]][LABELS[0]]["by_pattern"]
    patterns = {name: shares["pair_accuracy"] for name, shares in by_pattern.items()}
    wrong = [pair for pair in pairs if not all(row["right"][document["matched_by"]][LABELS[0]] for row in pair)]
    return replace(_outcome(file, document, f"{len(pairs)} pairs", figures, patterns), wrong_pairs=wrong)


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
    """The units are photos: each is asked about six times per strategy."""
    rows = _answers(file)
    strategies = list(dict.fromkeys(row["id"].partition("/")[0] for row in rows))
    photos: dict[str, list[Row]] = {}
    for row in rows:
        photos.setdefault(row["image"], []).append(row)
    counts = np.zeros((len(photos), len(strategies), 4))  # [U, S, 4]
    for photo, asked in enumerate(photos.values()):
        for row in asked:
            counts[photo, strategies.index(row["id"].partition("/")[0]), outcome(row["yes"], row["present"])] += 1
    units = tuple(f"{name}: {[(row['id'], row['text'], row['present']) for row in asked]}" for name, asked in photos.items())
    flat = counts.reshape(len(photos), -1)  # [U, S*4]
    rates = {"accuracy": "accuracy", "f1": "f1", "yes": "yes_ratio"}
    figures: dict[str, Figure] = {f"pope {key}": Tally(units, flat, _by_strategy(RATES[name])) for key, name in rates.items()}
    return _outcome(file, document, f"{len(rows)} questions about {len(photos)} photos ({', '.join(strategies)})", figures)


def _by_strategy(rate: Callable[[Counts], Counts]) -> Callable[[Counts], Counts]:
    """Return the mean over the strategies of a rate, as a function of their counts [..., S*4]."""
    return lambda counts: rate(counts.reshape(*counts.shape[:-1], -1, 4)).mean(axis=-1)  # [...]


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
    figures: dict[str, Figure] = {f"{row['task']} {row['metric']}": Given(row["value"], row["error"]) for row in document["figures"]}
    counts = {row["task"]: row["samples"] for row in document["figures"]}
    return _outcome(file, document, ", ".join(f"{task}: {count} questions" for task, count in counts.items()), figures)


_READERS: dict[str, Callable[[Path, Row], Outcome]] = {
    "mmvp": _mmvp,
    "mmvp-vlm": _mmvp_vlm,
    "pope": _pope,
    "chair": _chair,
    "lmms-eval": _lmms,
}
_HEADLINES = {"mmvp pairs": "pair_accuracy", "mmvp-vlm pairs": "average", "pope accuracy": "accuracy", "chair s": "chair_s"}


def _check(file: Path, document: Row, measured: Outcome) -> None:
    for key, name in _HEADLINES.items():
        if key in measured.figures and not math.isclose(measured.figures[key].value, document[name], abs_tol=1e-9):
            raise ValueError(
                f"{file}: {name} is {document[name]}, but its answers make {measured.figures[key].value}: the files are of different runs"
            )
