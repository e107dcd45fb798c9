"""`gather` joins runs into a table (rows are models, columns are measures), with intervals, seeds, differences and correlations."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mof.evals.benchmark import Measure
from mof.evals.intervals import Difference, Figure, Interval, Tally, difference, half_width, mean_interval
from mof.evals.outcomes import MEASURES, Outcome, read_outcome
from mof.evals.patterns import PATTERNS, Correlation, by_type, correlate
from mof.evals.published import MMVP_VLM

PUBLISHED_ENCODERS = ("OpenAI ViT-L/14 224", "OpenAI ViT-L/14 336")
"""They stand in for probes in correlations if no probe is given."""


@dataclass(frozen=True)
class Cell:
    """A cell holds a figure in the unit of its column."""

    value: float
    interval: Interval | None
    seeds: int
    spread: float | None
    """Standard deviation over seeds; None for a single run."""

    @property
    def text(self) -> str:
        spread = "" if self.spread is None else f" ±{self.spread:.1f}"
        interval = "" if self.interval is None else f" [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"
        return f"{self.value:.1f}{spread}{interval}"


@dataclass(frozen=True)
class Report:
    """A report holds everything that the page shows."""

    outcomes: list[Outcome]
    columns: dict[str, Measure]
    rows: dict[str, dict[str, Cell]]
    """Model -> column -> cell, for the columns on which the model was measured."""
    differences: list[tuple[str, str, str, Difference]]
    """(column, model, other model, first minus second as a share)."""
    correlations: list[tuple[str, str, Correlation]]
    """(encoder, model, their correlation by pattern)."""
    encoders: dict[str, dict[str, float]]
    """Encoder -> pattern -> share of right pairs. If no encoder but models were measured, these are the published rows of CLIP."""
    patterns: dict[str, dict[str, float]]
    """Model -> pattern -> share of right pairs."""
    notes: list[tuple[str, str, str, list[str]]]
    """(model, benchmark, data that were measured on, deviations)."""


def gather(places: Sequence[str | Path]) -> Report:
    """Return the report of runs: folders that `mof eval` wrote, and .json files of `mof probe mmvp-vlm`.

    Runs of one model on one benchmark are joined if they name different seeds.

    Raises:
        ValueError: for a place without a finished run, or two runs of one model, benchmark and seed.
    """
    if not places:
        raise ValueError("no runs: name at least one folder that `mof eval` wrote, or .json of `mof probe mmvp-vlm`")
    outcomes = [read_outcome(place) for place in places]
    runs: dict[tuple[str, str], list[Outcome]] = {}
    for run in outcomes:
        same = runs.setdefault((run.model, run.benchmark), [])
        if twin := next((earlier for earlier in same if earlier.seed == run.seed), None):
            raise ValueError(
                f"{twin.file} and {run.file} are both of {run.model} on {run.benchmark} with seed {run.seed}: tell them apart with --name "
                "or --seed of `mof eval`"
            )
        same.append(run)
    figures: dict[str, dict[str, list[Figure]]] = {run.model: {} for run in outcomes}
    for (model, _), same in runs.items():
        for key in same[0].figures:
            if all(key in run.figures for run in same):
                figures[model][key] = [run.figures[key] for run in same]
    columns = {key: measure for key, measure in MEASURES.items() if any(key in by for by in figures.values())}
    rows = {model: {key: _cell(by[key], measure) for key, measure in columns.items() if key in by} for model, by in figures.items()}
    patterns = {kind: _patterns([same for (_, name), same in runs.items() if name == kind]) for kind in ("mmvp-vlm", "mmvp")}
    encoders = {f"{name} (encoder)": by for name, by in patterns["mmvp-vlm"].items()}
    if patterns["mmvp"] and not encoders:
        for name in PUBLISHED_ENCODERS:
            encoders[f"{name} (published)"] = dict(zip(PATTERNS, (share / 100 for share in MMVP_VLM[name]), strict=True))
    correlations = [(encoder, model, correlate(xs, ys)) for encoder, xs in encoders.items() for model, ys in patterns["mmvp"].items()]
    return Report(
        outcomes, columns, rows, _differences(figures), correlations, encoders, patterns["mmvp"],
        [_note(same, outcomes) for same in runs.values()],
    )  # fmt: skip


def _cell(runs: Sequence[Figure], measure: Measure) -> Cell:
    values = [measure.scale * run.value for run in runs]
    interval = mean_interval(runs)
    scaled = None if interval is None else (measure.scale * interval[0], measure.scale * interval[1])
    return Cell(statistics.fmean(values), scaled, len(runs), statistics.stdev(values) if len(runs) > 1 else None)


def _differences(figures: dict[str, dict[str, list[Figure]]]) -> list[tuple[str, str, str, Difference]]:
    differences = []
    for key in (key for key, measure in MEASURES.items() if measure.compared):
        for first, second in itertools.combinations([model for model, by in figures.items() if key in by], 2):
            if (between := difference(figures[first][key], figures[second][key])) is not None:
                differences.append((key, first, second, between))
    return differences


def _patterns(runs: Sequence[Sequence[Outcome]]) -> dict[str, dict[str, float]]:
    """Return model -> pattern -> mean share over seeds. The paper's patterns come in its order, before others."""
    shares = {}
    for same in runs:
        by = [by_type(run.patterns) for run in same]
        names = sorted(by[0], key=lambda name: list(PATTERNS).index(name) if name in PATTERNS else len(PATTERNS))
        if names and all(run.keys() == by[0].keys() for run in by):
            shares[same[0].model] = {name: statistics.fmean(run[name] for run in by) for name in names}
    return shares


def _note(same: Sequence[Outcome], outcomes: Sequence[Outcome]) -> tuple[str, str, str, list[str]]:
    """Return the note on a model's runs on a benchmark. It says if they do not have the questions of the first model."""
    first = next(run for run in outcomes if run.benchmark == same[0].benchmark)
    notes = list(dict.fromkeys(note for run in same for note in run.deviations))
    pairs = [(figure, first.figures.get(key)) for run in same for key, figure in run.figures.items()]
    if any(isinstance(a, Tally) and isinstance(b, Tally) and a.units != b.units for a, b in pairs):
        notes.append(f"other questions, photos or labels than those of {first.model}: no difference is computed")
    seeds = [str(run.seed) for run in same if run.seed is not None]
    named = f", seed {seeds[0]}" if len(seeds) == 1 else f", seeds {', '.join(seeds)}" if seeds else ""
    return same[0].model, same[0].benchmark, same[0].basis + named, notes


def precision(report: Report) -> str | None:
    """Return a sentence on the precision that the number of MMVP pairs allows; None without MMVP."""
    tallies = [run.figures["mmvp pairs"] for run in report.outcomes if "mmvp pairs" in run.figures]
    counts = sorted({len(tally.units) for tally in tallies if isinstance(tally, Tally)})
    sentences = [
        f"{count} pairs make ±{100 * half_width(0.25, count):.0f} points at 25 % and ±{100 * half_width(0.5, count):.0f} at 50 %"
        for count in counts
    ]
    return f"MMVP: {'; '.join(sentences)} (95 %)." if sentences else None
