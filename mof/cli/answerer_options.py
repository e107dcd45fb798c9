"""The options by which every `mof eval` command is told who answers."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mof.evals.answerers import AnswersFile, Endpoint, LocalModel
from mof.evals.answering import Answerer
from mof.evals.run import Run


@dataclass(frozen=True)
class AnswererOptions:
    """Each field is an option of the command line."""

    out: Annotated[Path, typer.Option(help="Folder for settings, cache, answers and result.")]
    model: Annotated[Path | None, typer.Option(help="Folder of a saved model with its processor.")] = None
    endpoint: Annotated[str | None, typer.Option(help="In place of a model: an OpenAI-compatible URL, such as http://host:8000/v1.")] = None
    model_name: Annotated[str | None, typer.Option(help="What the endpoint calls the model.")] = None
    answers: Annotated[Path | None, typer.Option(help="In place of a model: file of finished answers, .json, .jsonl, .csv.")] = None
    name: Annotated[str | None, typer.Option(help="What tables call the model; by default its folder, file or --model-name.")] = None
    seed: Annotated[int | None, typer.Option(help="With which the model was trained: `mof eval report` joins a name's seeds.")] = None
    cache: Annotated[Path | None, typer.Option(help="File that keeps answers; by default in the folder --out.")] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Of a model: prompts at a time.")] = 8
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of a model; with 16 bits, answers may depend on the batch size.")
    ] = "float32"
    concurrency: Annotated[int, typer.Option(min=1, help="Of an endpoint: prompts at a time.")] = 8
    timeout: Annotated[float, typer.Option(help="Of an endpoint: seconds for one attempt.")] = 120.0
    attempts: Annotated[int, typer.Option(min=1, help="Of an endpoint: at each prompt.")] = 6
    key_variable: Annotated[str, typer.Option(help="Environment variable with the endpoint's API key.")] = "OPENAI_API_KEY"
    price_in: Annotated[float, typer.Option(min=0, help="Per million tokens read, judge included, to report costs.")] = 0.0
    price_out: Annotated[float, typer.Option(min=0, help="Per million tokens written.")] = 0.0

    def run(self, max_new_tokens: int) -> Run:
        """The run with its answerer. ValueError unless exactly one is named."""
        given = [name for name in ("model", "endpoint", "answers") if getattr(self, name) is not None]
        if len(given) != 1 or (self.endpoint is None) != (self.model_name is None):
            raise ValueError("give one of --model FOLDER, --endpoint URL with --model-name NAME, and --answers FILE")
        return Run(
            self.out, self._answerer(max_new_tokens), self.cache, (self.price_in, self.price_out), progress=True,
            name=self.name, seed=self.seed,
        )  # fmt: skip

    def _answerer(self, max_new_tokens: int) -> Answerer:
        if self.answers is not None:
            return AnswersFile(self.answers)
        if self.endpoint is not None:
            return self.endpoint_of(self.endpoint, self.model_name or "", max_new_tokens)
        assert self.model is not None
        return LocalModel.load(self.model, dtype=self.dtype, batch_size=self.batch_size, max_new_tokens=max_new_tokens)

    def endpoint_of(self, url: str, model: str, max_new_tokens: int) -> Endpoint:
        """An endpoint that is asked as these options say."""
        return Endpoint(
            url, model, key_variable=self.key_variable, max_new_tokens=max_new_tokens,
            concurrency=self.concurrency, timeout=self.timeout, attempts=self.attempts,
        )  # fmt: skip


def takes_answerer(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `answerer` of a typer command by the options above: typer knows no groups of options."""
    hints = typing.get_type_hints(AnswererOptions, include_extras=True)
    fields = dataclasses.fields(AnswererOptions)

    def run(**arguments: Any) -> None:
        options = AnswererOptions(**{field.name: arguments.pop(field.name) for field in fields})
        command(answerer=options, **arguments)

    own = typing.get_type_hints(command, include_extras=True)
    signature = inspect.signature(command)
    parameters = [one.replace(annotation=own[name]) for name, one in signature.parameters.items() if name != "answerer"]
    for field in fields:
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]))
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature([one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters])  # type: ignore[attr-defined]
    return run
