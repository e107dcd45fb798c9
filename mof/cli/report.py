"""`mof eval report` shows several runs on a page, and `mof eval correlation` shows them in a table."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encoders.command_options import output_option, plot_option
from encoders.console import Console
from encoders.model_cards import CARD, HEAD, write_section
from encoders.saved_folders import require_config
from encoders.whole_files import write_text
from mof.evals.published import MMVP_CORRELATION
from mof.evals.text_tables import TextTable

if TYPE_CHECKING:
    from mof.evals.patterns import Correlation

Runs = Annotated[list[Path], typer.Argument(help="Folders that `mof eval` wrote, and .json files of `mof probe mmvp-vlm`.")]


def report(
    runs: Runs,
    output: Annotated[Path, output_option("The page. Its table is written beside it as .csv, .md, .tex and .txt.")] = Path("report.html"),
    card: Annotated[
        Path | None, typer.Option(help="Folder of the saved model that the runs measured: its card (README.md) gets the results.")
    ] = None,
) -> None:
    """Join runs into one page: a row per model, a column per measure, with intervals, seeds, differences and deviations.

    \b
    Example:
      mof eval report evals/mof-mmvp evals/llava-mmvp probes/clip-vit-l14-336.json -o report.html
    \b
    The results of a model in its own folder, for the Hugging Face hub:
      mof eval report evals/mof-mmvp evals/mof-pope --card models/mof
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: expected a name that ends in .html")
    from mof.evals.report import gather, precision
    from mof.evals.report_files import result_facts, write_files
    from mof.evals.report_page import to_tables, write_html

    joined = gather(runs)
    if card is not None:
        if len(joined.rows) > 1:
            raise ValueError(f"--card {card}: expected runs of this model alone, got {', '.join(joined.rows)}; name fewer runs")
        require_config(card)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [*to_tables(joined), *([precision(joined)] if precision(joined) else [])]
    write_html(joined, output)
    files = write_files(joined, output)
    if card is not None:
        write_section(card, "Results", result_facts(joined), HEAD)
    text = Console(file=StringIO(), width=120, record=True)
    text.print(*lines)
    write_text(output.with_suffix(".txt"), text.export_text())
    console = Console()
    console.print(*lines)
    console.print(f"written to {output}, {', '.join(file.name for file in files)} and {output.with_suffix('.txt').name}")
    if card is not None:
        console.print(f"written into {card / CARD}")


def correlation(
    runs: Runs,
    plot: Annotated[Path | None, plot_option("Picture of the shares by pattern, .png or .svg.")] = None,
) -> None:
    """Show whether models fail on the patterns on which encoders fail, by Pearson's r beside published correlations.

    Without a probe, the published rows of OpenAI's CLIP stand in. The questions need a category (see --patterns of `mof eval mmvp`).

    \b
    Example:
      mof eval correlation probes/clip-vit-l14-336.json evals/mof-mmvp evals/llava-mmvp --plot patterns.svg
    """
    from mof.evals.plots import plot_patterns
    from mof.evals.report import gather

    joined = gather(runs)
    if not joined.correlations:
        raise ValueError("no run of `mof eval mmvp` with patterns among these: give --patterns to `mof eval mmvp`, or a column Category")
    rows = {f"{encoder}; {model}": _shown(result) for encoder, model, result in joined.correlations}
    rows |= {f"CLIP (published); {model} (published)": [f"{r:.2f}", "-", "9"] for model, r in MMVP_CORRELATION.items()}
    console = Console()
    console.print(TextTable("Pearson's r over patterns", ("r", "95 %", "patterns"), rows, "encoder; model"))
    for encoder, model, result in joined.correlations:
        if result.r is None:
            console.print(f"{encoder}, {model}: undefined, since {result.undefined}")
    if plot is not None:
        plot_patterns(joined.patterns, joined.encoders, plot)
        console.print(f"written to {plot}")


def _shown(result: Correlation) -> list[str]:
    if result.r is None or result.interval is None:
        return ["undefined", "-", str(len(result.patterns))]
    return [f"{result.r:.2f}", f"{result.interval[0]:.2f} to {result.interval[1]:.2f}", str(len(result.patterns))]
