"""`mof blind-pairs`: images that CLIP takes for the same."""

from __future__ import annotations

import typer

from mof.commands.annotate import annotate, export

blind_pairs = typer.Typer(
    help="Pairs of images that CLIP takes for the same.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)
blind_pairs.command()(annotate)
blind_pairs.command()(export)
