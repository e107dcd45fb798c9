"""`mof eval --suite`: the benchmarks of a paper that lmms-eval runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mof.evals.lmms.suites import SuiteRun, rows_of, run_suite


def suite(
    context: typer.Context,
    suite: Annotated[
        Literal["vig", "mof"] | None,
        typer.Option(help="The paper: MMHal-Bench, LLaVA-Bench, MM-Vet, MMBench, DocVQA, GQA, ScienceQA and CV-Bench, or four of them."),
    ] = None,
    via: Annotated[Literal["lmms-eval"], typer.Option(help="Who runs the suite; pip install 'mof-vig[lmms]'.")] = "lmms-eval",
    model: Annotated[Path | None, typer.Option(help="Of a suite: folder of a saved model with its processor.")] = None,
    out: Annotated[Path | None, typer.Option(help="Of a suite: folder for cache, answers and result.")] = None,
    name: Annotated[str | None, typer.Option(help="Of a suite: what tables call the model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of a suite: with which the model was trained.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of a suite: prompts at a time.")] = 8,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of a suite.")] = "float32",
    limit: Annotated[int | None, typer.Option(min=1, help="Of a suite: only so many questions per benchmark, for a trial.")] = None,
) -> None:
    """Measure models, endpoints or finished answers: by a command below, or by a suite.

    Data sets come from the hub, or from folders called like them, such as nyu-visionx/CV-Bench, where this is run.

    \b
    Example:
      mof eval --suite vig --via lmms-eval --model runs/mof --out evals/mof-vig
    """
    if context.invoked_subcommand is not None:
        if suite is not None:
            raise ValueError(f"give --suite or the command {context.invoked_subcommand}, not both")
        return
    if suite is None or model is None or out is None:
        raise ValueError("give a command such as mmvp, or --suite with --model and --out")
    console = Console()
    result = run_suite(suite, SuiteRun(model, out, name, seed, dtype, batch_size, limit), console)
    table = Table(title=f"{result['model']}, suite {suite} by {via}", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("benchmark", "value", "questions"):
        table.add_column(column, justify="left" if column == "benchmark" else "right")
    for measure, cells in rows_of(result["figures"]).items():
        table.add_row(measure, *cells)
    console.print(table)
    for note in result["deviations"]:
        console.print(f"- {note}")
    console.print(f"written to {out}")
