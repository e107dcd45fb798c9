"""`mof blind-pairs annotate` lets a person describe pairs, and `export` makes a benchmark of the descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from encoders.command_options import output_option
from encoders.terminal import say

Folder = Annotated[Path, typer.Argument(help="Folder that `mof blind-pairs` wrote.")]
LISTED = 20  # pairs that are left out


def annotate(
    folder: Folder,
    port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            help="Port of the page. Other machines reach it only if it is forwarded. 0: any free port.",
        ),
    ] = 0,
    ticked: Annotated[Path | None, typer.Option(help="File of ticked pairs that the gallery saved: only these are shown.")] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Describe pairs of images by keyboard, on a local page: the pattern they differ in, statements, a question with options.

    From another machine, forward a port (ssh -L 8000:localhost:8000 HOST mof blind-pairs annotate pairs --port 8000 --no-browser), and
    open the printed address. Every step is saved in annotations.jsonl in the folder. When it is called again, the command goes on with
    the first pair that is not done. Several pages may be open at once.

    \b
    Example:
      mof blind-pairs annotate pairs
    """
    try:
        from mof.pairs.annotation.server import AnnotationServer  # optional libraries
    except ModuleNotFoundError as error:
        raise ValueError(f'the annotation page needs {error.name}: pip install "mof-vig[annotate]"') from error
    server = AnnotationServer(folder, port, ticked)
    say(f"{server.url} shows {len(server.session.pairs)} pairs; saved in {server.session.pairs.journal.file}. Stop with Ctrl-C.")
    if browser:
        typer.launch(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        done = server.session.progress()
        say(f"{done['done']} of {done['pairs']} pairs are done; next: mof blind-pairs export {folder} --output BENCHMARK")


def export(folder: Folder, output: Annotated[Path, output_option("New folder for MMVP and MMVP_VLM.")]) -> None:
    """Write annotations as benchmarks in the layouts of MMVP and MMVP-VLM; incomplete annotations are left out, and listed.

    \b
    Example:
      mof blind-pairs export pairs --output benchmark
    """
    from mof.pairs.annotation.export import MMVP, MMVP_VLM, export_annotations  # slow

    done = export_annotations(folder, output, progress=True)
    for number, reason in done.left_out[:LISTED]:
        say(f"left out: pair {number}: {reason}")
    if len(done.left_out) > LISTED:
        say(f"... and {len(done.left_out) - LISTED} more")
    if done.untouched:
        say(f"{done.untouched} pairs were not annotated yet")
    if done.elsewhere:
        names = "; ".join(" and ".join(names) for names in done.elsewhere[:LISTED])
        say(f"{len(done.elsewhere)} complete annotations are of pairs that the table does not hold (any more), such as {names}")
    for pattern, count in done.by_pattern.items():
        say(f"{pattern}: {count}")
    count = sum(done.by_pattern.values())
    say(f"{count} pairs written: {output / MMVP} for `mof eval mmvp`, {output / MMVP_VLM} for `mof probe mmvp-vlm`")
