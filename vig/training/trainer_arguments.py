"""NAME=VALUE on the command line -> arguments of `transformers.TrainingArguments`, of the types that it declares."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

NAMES = sorted(field.name for field in dataclasses.fields(TrainingArguments) if field.init)


class _Parser(HfArgumentParser):
    """It raises, where argparse prints a page and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"--set: {message}")


def parse_arguments(texts: Sequence[str], own: Mapping[str, str]) -> dict[str, Any]:
    """["weight_decay=0.1"] -> {"weight_decay": 0.1}.

    Args:
        own: names that have an option of their own -> that option.

    Raises:
        ValueError: for another form, a name that there is not, or one out of `own`, and a value of another type.
    """
    given = {}
    for text in texts:
        name, equals, _ = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, such as weight_decay=0.1; got {text!r}")
        if name in own:
            raise ValueError(f"--set {name}: give {own[name]} instead")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES) or ["see transformers.TrainingArguments"]
            raise ValueError(f"--set: there is no {name!r}; {', '.join(near)}?")
        given[name] = f"--{text}"
    values = vars(_Parser(TrainingArguments, allow_abbrev=False).parse_args(list(given.values())))
    return {name: values[name] for name in given}
