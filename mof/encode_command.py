"""`mof encode`: the encoders that are known, and features of images written to a store."""

from __future__ import annotations

from typing import Annotated

import typer

from mof.encoder_table import print_encoders


def encode(
    list_encoders: Annotated[bool, typer.Option("--list", help="Print the encoders that are known by name.")] = False,
) -> None:
    """Show the image encoders and how many tokens each gives.

    \b
    Example:
      mof encode --list
    """
    if not list_encoders:
        raise ValueError("nothing to do; `mof encode --list` prints the encoders")
    print_encoders()
