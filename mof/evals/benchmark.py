"""The module of each benchmark gives this description for reports, beside its questions and their score.

A new benchmark needs a module like `mof.evals.pope`, an entry in `mof.evals.outcomes.BENCHMARKS`, and a command in `mof.cli.eval`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from mof.evals.intervals import Figure, Tally

Row = dict[str, Any]  # JSON-able


@dataclass(frozen=True)
class Measure:
    """A measure is a column of a report."""

    benchmark: str
    title: str
    says: str
    """The figure's meaning, and the figure of a model that guesses."""
    better: str = "higher"
    """"higher", "lower" or "" for neither."""
    chance: float | None = None
    scale: float = 100
    compared: bool = False
    """True if the report lists differences between models."""


@dataclass(frozen=True)
class Measured:
    """Measured holds the figures of a finished run, with the units that they are computed from."""

    basis: str
    """The data that were measured on, such as "150 pairs"."""
    figures: dict[str, Figure]
    """Key of `Benchmark.MEASURES` -> figure."""
    patterns: dict[str, float] = field(default_factory=dict)
    """Pattern, as the questions spell it -> share of right pairs."""
    parts: dict[str, Tally] = field(default_factory=dict)
    """Part of the benchmark, such as a pattern or a strategy -> the headline's figure on this part alone."""
    wrong_pairs: list[tuple[Row, Row]] = field(default_factory=list)
    """For MMVP, the two rows of answers.jsonl for each pair that does not count."""


class Benchmark(Protocol):
    """A benchmark is a module; a report needs these names of it."""

    NAME: str
    """The benchmark's name in files."""
    MEASURES: dict[str, Measure]
    HEADLINE: tuple[str, str]
    """A measure and the name of the same figure in result.json, or two empty texts."""

    def measured(self, result: Row, rows: list[Row], /) -> Measured:
        """Return the figures of a run from the content of its result.json and the rows of answers.jsonl."""
