"""The part that the two recipes of analyses share: their options, and the comparison of the given models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from encoders.runs import write_json
from study.command import Options
from vig.analyses.comparison import compare_models
from vig.analyses.image_match import Groups
from vig.analyses.misleading_text import Question


def analysis_options(docstring: str | None) -> Options:
    """Return the options of both recipes, for the recipe to add its own."""
    options = Options(docstring)
    options.add_argument("models", type=Path, nargs="+", help="folders of saved models")
    options.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    options.output("JSON file for the figures")
    return options


def analyse(args: argparse.Namespace, groups: Groups, questions: Sequence[Question], console: Console | None = None) -> None:
    """Analyse the models that `args` names: print the tables, and write the figures into `--output` if given."""
    comparison = compare_models(args.models, groups, questions)
    (console or Console()).print(*comparison.tables())
    if args.output:
        write_json(args.output, comparison.figures())
