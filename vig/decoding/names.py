"""Command lines name decoding methods: "vcd", or "vcd:alpha=0.5:null=blur"."""

from __future__ import annotations

import typing
from dataclasses import fields

from vig.decoding.contrasts import ICD, LACING, M3ID, VCD
from vig.decoding.edits import PAI, VAR
from vig.decoding.method import Decoding

METHODS: dict[str, type[Decoding]] = {method.name: method for method in (VCD, ICD, M3ID, PAI, VAR, LACING)}


def build_decoding(text: str) -> Decoding:
    """Return the method that a text NAME[:OPTION=VALUE...] names. Options that it does not give have their published values.

    Raises:
        ValueError: for an unknown name, option or value.
    """
    name, *options = text.split(":")
    if name not in METHODS:
        raise ValueError(f"unknown decoding {name!r}; expected one of {', '.join(METHODS)}")
    method = METHODS[name]
    types = typing.get_type_hints(method)
    known = [field.name for field in fields(method)]
    values = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in known or not equals:
            raise ValueError(f"unknown option {option!r} of the decoding {name}; expected NAME=VALUE of {', '.join(known)}")
        try:
            values[key] = types[key](value)
        except ValueError:
            raise ValueError(f"decoding {name}: {key} should be a {types[key].__name__}, got {value!r}") from None
    return method(**values)
