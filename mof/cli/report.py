"""`mof eval report` and `mof eval correlation`: what several runs say together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mof.evals.patterns import Correlation
from mof.evals.plots import plot_patterns
from mof.evals.published import MMVP_CORRELATION
from mof.evals.report import gather, precision, write_csv
from mof.evals.report_page import to_tables, write_html

Runs = Annotated[list[Path], typer.Argument(help="Folders that `mof eval` wrote, and .json files of `mof probe mmvp-vlm`.")]


def report(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page; its table goes beside it as .csv and .txt.")] = Path("report.html"),
) -> None:
    """Join runs into one page: a row per model, a column per measure, with intervals, seeds, differences and deviations.

    \b
    Example:
      mof eval report evals/mof-mmvp evals/llava-mmvp probes/clip-vit-l14-336.json -o report.html
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {out}: expected a name that ends in .html")
    found = gather(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    said = [*to_tables(found), *([precision(found)] if precision(found) else [])]
    write_html(found, out)
    write_csv(found, out.with_suffix(".csv"))
    with out.with_suffix(".txt").open("w", encoding="utf-8") as stream:
        Console(file=stream, width=120).print(*said)
    console = Console()
    console.print(*said)
    console.print(f"written to {out}, {out.with_suffix('.csv').name} and {out.with_suffix('.txt').name}")


def correlation(
    runs: Runs,
    plot: Annotated[Path | None, typer.Option(help="Picture of the shares by pattern, .png or .svg.")] = None,
) -> None:
    """Whether models fail on the patterns on which encoders fail: Pearson's r over MMVP's patterns, beside the published ones.

    Without a probe, the published rows of OpenAI's CLIP stand in. The questions need a category (see --patterns of `mof eval mmvp`).

    \b
    Example:
      mof eval correlation probes/clip-vit-l14-336.json evals/mof-mmvp evals/llava-mmvp --plot patterns.svg
    """
    found = gather(runs)
    if not found.correlations:
        raise ValueError("no run of `mof eval mmvp` with patterns among these: give --patterns to `mof eval mmvp`, or a column Category")
    table = Table(title="Pearson's r over patterns", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("encoder", "model", "r", "95 %", "patterns"):
        table.add_column(column, justify="left" if column in ("encoder", "model") else "right", overflow="fold")
    for encoder, model, one in found.correlations:
        table.add_row(encoder, model, *_shown(one))
    for model, r in MMVP_CORRELATION.items():
        table.add_row("CLIP (published)", f"{model} (published)", f"{r:.2f}", "-", "9")
    console = Console()
    console.print(table)
    for encoder, model, one in found.correlations:
        if one.r is None:
            console.print(f"{encoder}, {model}: undefined, since {one.undefined}")
    if plot is not None:
        plot_patterns(found.patterns, found.encoders, plot)
        console.print(f"written to {plot}")


def _shown(one: Correlation) -> tuple[str, str, str]:
    if one.r is None or one.interval is None:
        return "undefined", "-", str(len(one.patterns))
    return f"{one.r:.2f}", f"{one.interval[0]:.2f} to {one.interval[1]:.2f}", str(len(one.patterns))
