"""`mof probe`: encoders measured on pairs that people can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from encoders import build_encoder
from mof.evals.mmvp_vlm import MMVPVLMResult, probe_mmvp_vlm
from mof.evals.patterns import PATTERNS, pattern_type
from mof.evals.plots import plot_probe
from mof.evals.published import MMVP_VLM, mmvp_vlm_average

probe = typer.Typer(help="Measure what encoders are blind to.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@probe.callback()
def _group() -> None:
    """Without it, typer would make the only sub-command the command itself."""


@probe.command("mmvp-vlm")
def mmvp_vlm(
    data: Annotated[Path, typer.Option(help="Folder with Questions.csv and the images.")],
    encoder: Annotated[list[str], typer.Option(help="Name of an encoder, as build_encoder takes it; may be given again.")],
    out: Annotated[Path | None, typer.Option(help="Folder for a .json and a .csv per encoder.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the table, .png or .svg.")] = None,
) -> None:
    """Share of the MMVP-VLM pairs that an image-text encoder tells apart, beside the published ones; chance is 25 %.

    Of encoders without a text tower: how similar the two images of a pair are.

    \b
    Example:
      mof probe mmvp-vlm --data MMVP_VLM --encoder clip-vit-l14-336 --encoder dinov2-vit-l14 --out probes --plot probes/table.png
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = [probe_mmvp_vlm(build_encoder(name).to(device), data, progress=True) for name in encoder]
    for result in results:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            stem = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in result.encoder)
            result.to_json(out / f"{stem}.json")
            result.to_csv(out / f"{stem}.csv")
    console = Console()
    rows = probe_rows(results)
    tables = ({"right pairs, %; chance 25": rows} if rows else {}) | {"cosine of a pair's images x 100": similarity_rows(results)}
    for title, table in tables.items():
        console.print(_table(title, table))
    for note in results[0].deviations:
        console.print(f"- {note}: the published rows are of the whole")
    if plot is not None:
        plot_probe(tables, plot)


PUBLISHED = " (published)"
Rows = dict[str, dict[str, float]]
"""name -> {type: value, ..., "average": value}"""


def probe_rows(results: Sequence[MMVPVLMResult]) -> Rows:
    """Right pairs in %: the published models where the types are theirs, then the encoders that read texts."""
    measured = [result for result in results if result.pairs[0].similarities is not None]
    rows: Rows = {}
    if measured and [pattern_type(type) for type in measured[0].by_pattern] == list(PATTERNS):
        for name, shares in MMVP_VLM.items():
            by_pattern = dict(zip(measured[0].by_pattern, shares, strict=True))
            rows[name + PUBLISHED] = by_pattern | {"average": mmvp_vlm_average(shares)}
    for result in measured:
        rows[result.encoder] = {type: 100 * share for type, share in result.by_pattern.items()} | {"average": 100 * result.average}
    return rows


def similarity_rows(results: Sequence[MMVPVLMResult]) -> Rows:
    """Mean cosine of a pair's images x 100: how blind each encoder is to the difference, with or without a text tower."""
    rows: Rows = {}
    for result in results:
        by_type = {type: 100 * value for type, value in result.image_similarity.items()}
        mean = 100 * sum(pair.image_similarity for pair in result.pairs) / len(result.pairs)
        rows[result.encoder] = by_type | {"average": mean}
    return rows


def _table(title: str, rows: Rows) -> Table:
    """Headings break rather than names and numbers: 80 columns are all that many terminals have."""
    published = any(name.endswith(PUBLISHED) for name in rows)
    table = Table(title=f"{title}; above the line: published" if published else title, box=SIMPLE, padding=0)
    table.add_column("encoder", no_wrap=True)
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right", overflow="fold", min_width=4)
    names = list(rows)
    for name, following in zip(names, [*names[1:], ""], strict=True):
        last = name.endswith(PUBLISHED) and not following.endswith(PUBLISHED)
        values = (f"{value:.1f}" if value < 99.95 else "100" for value in rows[name].values())
        table.add_row(name.removesuffix(PUBLISHED), *values, end_section=last)
    return table
