"""`mof vig misleading` measures answers to questions behind a false statement."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from encoders.command_groups import starts_over
from encoders.command_options import Images, Models, TrustRemoteCode, output_option
from encoders.console import Console
from encoders.runs import write_json
from mof.data.rows import read_records
from vig.analyses.comparison import misleading_table
from vig.analyses.misleading_text import misleading_text
from vig.saved_models import load_model, model_names


@starts_over
def misleading(
    model: Models,
    questions: Annotated[
        Path, typer.Option(help='JSON list of {"question", "image", "options", "answer"}, optionally "pair" and "false_statement".')
    ],
    images: Images,
    output: Annotated[Path | None, output_option("JSON file for the figures.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure the accuracy of greedy answers, with the question alone and with a false statement before it.

    A question without a false_statement gets "The answer is X.", where X is its first wrong option.

    \b
    Example:
      mof vig misleading --model runs/full --model runs/vig --questions data/questions.json --images data/images --output misleading.json
    """
    asked = read_records(questions)
    results = {}
    for name, folder in model_names(model).items():
        network, processor = load_model(folder, trust_remote_code=trust_remote_code)
        results[name] = misleading_text(network, processor, asked, image_folder=images, progress=True)
    if output is not None:
        figures = {name: {way: asdict(result) for way, result in by_way.items()} for name, by_way in results.items()}
        write_json(output, figures)
    Console().print(misleading_table(results))
