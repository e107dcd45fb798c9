"""`mof blind-pairs annotate` and `export`: pairs described by a person, and the benchmark that comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mof.pairs.annotation.export import MMVP, MMVP_VLM, export_annotations
from mof.pairs.annotation.server import AnnotationServer
from mof.pairs.annotation.session import JOURNAL

Folder = Annotated[Path, typer.Argument(help="Folder that `mof blind-pairs` wrote.")]
SHOWN = 20  # pairs that are left out


def annotate(
    folder: Folder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where the page is served, on this machine only; 0: any free port.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Describe pairs of images by keyboard, on a local page: the pattern they differ in, statements, a question with options.

    Every step is saved in annotations.jsonl in the folder. Stopped and called again, it goes on with the first pair that is not
    done. Several pages may be open at once.

    \b
    Example:
      mof blind-pairs annotate pairs
    """
    with AnnotationServer(folder, port) as server:
        typer.echo(f"{server.url} shows {len(server.session.table)} pairs; saved in {folder / JOURNAL}. Stop with Ctrl-C.")
        if browser:
            typer.launch(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            done = server.session.progress()
            typer.echo(f"{done['done']} of {done['pairs']} pairs are done; next: mof blind-pairs export {folder} --out BENCHMARK")


def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for MMVP and MMVP_VLM.")],
) -> None:
    """Write what was annotated as benchmarks in the layouts of MMVP and MMVP-VLM; what is incomplete is left out, and listed.

    \b
    Example:
      mof blind-pairs export pairs --out benchmark
    """
    done = export_annotations(folder, out, progress=True)
    for number, reason in done.left_out[:SHOWN]:
        typer.echo(f"left out: pair {number}: {reason}")
    if len(done.left_out) > SHOWN:
        typer.echo(f"... and {len(done.left_out) - SHOWN} more")
    if done.untouched:
        typer.echo(f"{done.untouched} pairs were not annotated yet")
    for pattern, count in done.by_pattern.items():
        typer.echo(f"{pattern}: {count}")
    typer.echo(
        f"{sum(done.by_pattern.values())} pairs written: {out / MMVP} for `mof eval mmvp`, {out / MMVP_VLM} for `mof probe mmvp-vlm`"
    )
