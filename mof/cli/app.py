"""The command `mof`: parses arguments and calls the library. Packages add sub-commands by entry points `mof.cli`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.core import TyperGroup

from encoders import read_image
from mof.auto_classes import register_auto_classes
from mof.cli.blind_pairs import pairs_app
from mof.cli.convert import convert
from mof.cli.encode import encode
from mof.cli.eval import evaluate
from mof.cli.probe import probe


class OneLineErrors(TyperGroup):
    """What the library refuses (ValueError, missing files) becomes one line on stderr and exit code 2, for all commands."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            typer.echo(f"mof: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


def chat(
    question: Annotated[str, typer.Argument(help="What to ask about the image.")],
    model: Annotated[Path, typer.Option(help="Folder of a saved model with its processor.")],
    image: Annotated[Path, typer.Option(help="Image file.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
) -> None:
    """Ask any saved image-text-to-text model about an image; the answer is decoded greedily.

    \b
    Example:
      mof chat --model runs/mof --image photo.jpg "Is the door open?"
    """
    _check_folder(model)
    register_auto_classes()
    content = [{"type": "image", "image": read_image(image)}, {"type": "text", "text": question}]
    network, processor = AutoModelForImageTextToText.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options).to(network.device)
    tokens = network.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)  # [1, prompt + answer]
    answer = tokens[0, inputs["input_ids"].shape[1] :]  # [answer]
    typer.echo(processor.decode(answer, skip_special_tokens=True).strip())


def build_app(commands: Mapping[str, typer.Typer | Callable[..., None]]) -> typer.Typer:
    """The command with its own sub-commands and those of other packages, by name: a function is a command, a typer a group."""
    app = typer.Typer(
        name="mof",
        cls=OneLineErrors,
        help="See and mend what vision-language models are blind to.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.command()(encode)
    app.command()(convert)
    app.command()(chat)
    app.add_typer(pairs_app, name="blind-pairs")
    app.add_typer(probe, name="probe")
    app.add_typer(evaluate, name="eval")
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main() -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    build_app({point.name: point.load() for point in entry_points(group="mof.cli")})()


def _check_folder(model: Path) -> None:
    """Before transformers takes a mistyped folder for the name of a model on the hub."""
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} holds no config.json: expected a folder that save_pretrained wrote")
