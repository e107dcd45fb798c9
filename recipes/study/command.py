"""Every recipe has this command line: options with hyphens, and users' errors in one line. The two recipes of analyses share more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from encoders.command_groups import OLD_SPELLINGS
from encoders.console import Console
from encoders.terminal import plain
from encoders.whole_files import write_json
from vig.analyses.comparison import compare_models
from vig.analyses.image_match import Groups
from vig.analyses.misleading_text import Question


class Options(argparse.ArgumentParser):
    """Options is a parser whose help is the recipe's docstring. For one release it also takes the former spellings (`--data_dir`)."""

    def __init__(self, docstring: str | None) -> None:
        super().__init__(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)

    def output(self, help: str, **options: Any) -> None:
        """Add `--output`, the option that every recipe has."""
        self.add_argument("--output", "-o", type=Path, help=help, **options)

    def data_folder(self, help: str) -> None:
        """Add `--data-dir`, the folder that paths in settings are relative to."""
        self.add_argument("--data-dir", type=Path, default=Path("data"), help=help)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        return super().parse_args([current_spelling(word) for word in (sys.argv[1:] if args is None else args)])


def current_spelling(word: str) -> str:
    """Return the option with hyphens, under the name that it has today. Other words stay as they are."""
    if not word.startswith("--"):
        return word
    name, sign, value = word.removeprefix("--").partition("=")
    name = name.replace("_", "-")
    return f"--{OLD_SPELLINGS.get(name, name)}{sign}{value}"


def run_recipe(main: Callable[[], None]) -> None:
    """Run a recipe's `main`. Transformers stays quiet, and errors that the user can mend are printed without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork after the tokenizer was used
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving weights; training keeps its own
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(plain(f"error: {error}")) from error
    except KeyboardInterrupt:
        print("interrupted; a recipe that has --resume goes on with it where it stopped", file=sys.stderr)
        raise SystemExit(130) from None


def analysis_options(docstring: str | None) -> Options:
    """Return the options of both recipes of analyses, for the recipe to add its own."""
    options = Options(docstring)
    options.add_argument("models", type=Path, nargs="+", help="folders of saved models")
    options.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    options.output("JSON file for the figures")
    return options


def analyse(args: argparse.Namespace, groups: Groups, questions: Sequence[Question]) -> None:
    """Analyse the models that `args` names: print the tables, and write the figures into `--output` if given."""
    comparison = compare_models(args.models, groups, questions)
    Console().print(*comparison.tables())
    if args.output:
        write_json(args.output, comparison.figures())
