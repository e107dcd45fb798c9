"""`mof probe` measures encoders on pairs that people can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encoders.command_groups import command_group, starts_over
from encoders.command_options import output_option, plot_option
from mof.evals.text_tables import TextTable

if TYPE_CHECKING:
    from mof.evals.mmvp_vlm import MMVPVLMResult

TAKEN_FOR_OFFICIAL = "taken for MMVP-VLM by its 135 pairs of photos in nine types; texts and pixels are not compared with the original"


@starts_over
def mmvp_vlm(
    data: Annotated[Path, typer.Option(help="Folder with Questions.csv and the images.")],
    encoder: Annotated[list[str], typer.Option(help="Name of an encoder, as build_encoder takes it. Can be given several times.")],
    output: Annotated[Path | None, output_option("Folder for a .json and a .csv per encoder.")] = None,
    plot: Annotated[Path | None, plot_option("Picture of the table, .png or .svg.")] = None,
) -> None:
    """Measure the share of the MMVP-VLM pairs that an image-text encoder tells apart, beside published shares; chance is 25 %.

    For an encoder without a text tower, only the similarity of the two images of a pair is measured.

    \b
    Example:
      mof probe mmvp-vlm --data MMVP_VLM --encoder clip-vit-l14-336 --encoder dinov2-vit-l14 --output probes --plot probes/table.png
    """
    import torch

    from encoders import build_encoder
    from encoders.console import Console
    from mof.evals.mmvp_vlm import probe_mmvp_vlm
    from mof.evals.plots import plot_probe
    from mof.evals.published import REPAIRED_SOURCE

    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = [probe_mmvp_vlm(build_encoder(name).to(device), data, progress=True) for name in encoder]
    for result in results:
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            result.to_json(output / f"{_stem(result.encoder)}.json")
            result.to_csv(output / f"{_stem(result.encoder)}.csv")
    console = Console()
    rows = probe_rows(results)
    others = "" if results[0].not_official is None else ", on MMVP-VLM, which these pairs are not"
    tables = {
        "right pairs, %; chance 25": rows,
        f"published{others}: right pairs, %": published_rows(results[0]) if rows else {},
        "cosine of a pair's images x 100": similarity_rows(results),
    }
    tables = {title: table for title, table in tables.items() if table}
    for title, table in tables.items():
        console.print(_table(title, table))
    sources = [f"the published rows with a + are from {REPAIRED_SOURCE}, the others from the MMVP paper (arXiv 2401.06209)"] if rows else []
    for note in [*(results[0].deviations or [TAKEN_FOR_OFFICIAL]), *sources]:
        console.print(f"- {note}")
    if plot is not None:
        plot_probe(f"{'MMVP-VLM' if results[0].not_official is None else 'Pairs, not MMVP-VLM'}: {results[0].folder}", tables, plot)


@starts_over
def layers(
    data: Annotated[Path, typer.Option(help="Folder of pairs in MMVP's layout: Questions.csv and the images.")],
    encoder: Annotated[list[str], typer.Option(help="Name of an encoder, as build_encoder takes it. Can be given several times.")],
    patterns: Annotated[Path | None, typer.Option(help="File of ids and patterns, if Questions.csv has no category.")] = None,
    cells: Annotated[int, typer.Option(min=1, help="Tokens are averaged over so many rows and columns; 1 forgets places.")] = 4,
    output: Annotated[Path | None, output_option("Folder for a .json and a .csv per encoder.")] = None,
    plot: Annotated[Path | None, plot_option("Picture of the shares by layer, .png or .svg.")] = None,
) -> None:
    """Probe every layer of an encoder: the share of pairs that a linear probe gets right, by pattern; chance is 25 %.

    \b
    Example:
      mof probe layers --data runs/benchmarks/MMVP --encoder mini-clip --encoder mini-dino --output probes --plot probes/layers.png
    """
    from encoders.console import Console
    from mof.evals.layer_probe import probe_layers
    from mof.evals.mmvp import read_mmvp
    from mof.evals.plots import plot_layers

    questions = read_mmvp(data, patterns)
    results = [probe_layers(name, questions, cells=cells, progress=True) for name in encoder]
    console = Console()
    for result in results:
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            result.write(output, _stem(result.encoder))
        title = f"{result.encoder}: right pairs by layer, %; chance 25"
        shown = {layer: [f"{value:.1f}" for value in row.values()] for layer, row in result.rows().items()}
        console.print(TextTable(title, [*result.by_pattern, "average"], shown, "layer"))
        best = result.average.index(max(result.average))
        low, high = result.intervals[best]
        console.print(f"best layer {result.layers[best]}: {100 * result.average[best]:.1f} % [{100 * low:.1f},{100 * high:.1f}]")
    if left_out := results[0].left_out:
        console.print(f"{left_out} of {len(questions) // 2} pairs are left out: an answer of theirs occurs in no other pair of the pattern")
    if plot is not None:
        plot_layers({result.encoder: result.rows() for result in results}, plot)


def _stem(encoder: str) -> str:
    """Return a file name for an encoder."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in encoder)


probe = command_group({"mmvp-vlm": mmvp_vlm, "layers": layers}, help="Measure what encoders are blind to.")
Rows = dict[str, dict[str, float]]
"""name -> {type: value, ..., "average": value}"""


def probe_rows(results: Sequence[MMVPVLMResult]) -> Rows:
    """Return right pairs in %, for the encoders that read texts."""
    measured = [result for result in results if result.pairs[0].similarities is not None]
    return {
        result.encoder: {type: 100 * share for type, share in result.by_pattern.items()} | {"average": 100 * result.average}
        for result in measured
    }


def published_rows(result: MMVPVLMResult) -> Rows:
    """Return the published models in %, under the names of the result's types; none for pairs of other types."""
    from mof.evals.patterns import PATTERNS, pattern_type
    from mof.evals.published import MMVP_VLM, MMVP_VLM_REPAIRED, mmvp_vlm_average

    if [pattern_type(type) for type in result.image_similarity] != list(PATTERNS):
        return {}
    return {
        name: dict(zip(result.image_similarity, shares, strict=True)) | {"average": mmvp_vlm_average(shares)}
        for name, shares in (MMVP_VLM | MMVP_VLM_REPAIRED).items()
    }


def similarity_rows(results: Sequence[MMVPVLMResult]) -> Rows:
    """Return the mean cosine of a pair's images x 100, for encoders with and without a text tower."""
    rows: Rows = {}
    for result in results:
        by_type = {type: 100 * value for type, value in result.image_similarity.items()}
        mean = 100 * sum(pair.image_similarity for pair in result.pairs) / len(result.pairs)
        rows[result.encoder] = by_type | {"average": mean}
    return rows


def _table(title: str, rows: Rows) -> TextTable:
    shown = {name: [f"{value:.1f}" if value < 99.95 else "100" for value in values.values()] for name, values in rows.items()}
    return TextTable(title, list(next(iter(rows.values()))), shown, "encoder")
