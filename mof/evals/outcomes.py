"""The outcome of a run is read from its files and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from encoders.digests import DamagedError, damaged
from encoders.storage import fetched
from encoders.whole_files import read_sealed, read_sealed_lines
from mof.evals import captions, chair, mmvp, mmvp_vlm, pope
from mof.evals.benchmark import Benchmark, Measured, Row
from mof.evals.intervals import Tally
from mof.evals.lmms import suites
from mof.evals.run import FORMAT

BENCHMARKS: dict[str, Benchmark] = {benchmark.NAME: benchmark for benchmark in (mmvp_vlm, mmvp, pope, chair, captions, suites)}
MEASURES = {key: measure for benchmark in BENCHMARKS.values() for key, measure in benchmark.MEASURES.items()}
"""The columns of a report, in their order."""


@dataclass(frozen=True, kw_only=True)
class Outcome(Measured):
    """Outcome holds the outcome of a model's run on a benchmark."""

    file: Path
    benchmark: str
    model: str
    seed: int | None
    deviations: list[str]


def read_outcome(place: str | Path) -> Outcome:
    """Read a folder that `mof eval` wrote, or a .json that `mof probe mmvp-vlm` wrote.

    Raises:
        DamagedError: for a file that was changed since, naming the file, and the line of an answer.
        ValueError: for any other place, a run that has not ended, or files that contradict each other.
    """
    place = fetched(place)
    file = place / "result.json" if place.is_dir() else place
    answers = file.with_name("answers.jsonl")
    try:
        document = read_sealed(file)
        if faults := damaged(file.parent, document.pop("files", {})):
            if answers in faults and answers.is_file():
                read_sealed_lines(answers)  # names the line
            raise DamagedError("; ".join(faults.values()))
        if document.get("format", FORMAT) != FORMAT:  # older releases wrote none
            raise ValueError(f"format {document['format']!r}, this version of mof-vig reads {FORMAT}")
        benchmark = BENCHMARKS[document["benchmark"]]
        rows = read_sealed_lines(answers) if benchmark in (mmvp, pope, chair, captions) else []  # the others have none
        outcome = _outcome(file, document, benchmark.measured(document, rows))
    except OSError as error:
        raise ValueError(
            f"{error.filename}: cannot be read ({error.strerror}); expected a folder that `mof eval` wrote to its end, or a .json "
            "of `mof probe mmvp-vlm`"
        ) from None
    except DamagedError as error:
        raise DamagedError(f"{error}; the same `mof eval` or `mof probe` again writes it anew, and asks no question again") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} is no result of `mof eval` or `mof probe mmvp-vlm` ({type(error).__name__}: {error})") from None
    measure, name = benchmark.HEADLINE
    if measure in outcome.figures and not math.isclose(value := outcome.figures[measure].value, document[name], abs_tol=1e-9):
        raise ValueError(f"{file}: {name} is {document[name]}, but its answers make {value}: the files are of different runs")
    return outcome


def _outcome(file: Path, document: Row, measured: Measured) -> Outcome:
    notes = document["deviations"]
    if not measured.figures:
        raise ValueError("no figures: nothing could be measured")
    if not isinstance(notes, list) or any(isinstance(figure, Tally) and not figure.units for figure in measured.figures.values()):
        raise ValueError("no answers, or no list of deviations")
    model = document["encoder"] if document["benchmark"] == mmvp_vlm.NAME else document["model"]
    return Outcome(
        **vars(measured), file=file, benchmark=document["benchmark"], model=str(model), seed=document.get("seed"), deviations=notes
    )
