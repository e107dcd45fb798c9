"""These options tell every `mof eval` command which model, endpoint or file answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from encoders.command_options import (
    MODEL_HELP,
    ClusterOptions,
    DecodingName,
    DtypeName,
    TrustRemoteCode,
    output_option,
    seed_option,
)
from mof.evals.decoding import load_decoding

if TYPE_CHECKING:
    from mof.evals.answerers import Endpoint
    from mof.evals.answering import Answerer
    from mof.evals.run import Run


@dataclass(frozen=True)
class AnswererOptions:
    """Each field is an option of the command line."""

    output: Annotated[Path, output_option("Folder for settings, cache, answers and result.", urls=True)]
    model: Annotated[Path | None, typer.Option(help=MODEL_HELP)] = None
    endpoint: Annotated[str | None, typer.Option(help="In place of a model: an OpenAI-compatible URL, such as http://host:8000/v1.")] = None
    model_name: Annotated[str | None, typer.Option(help="The endpoint's name for the model.")] = None
    answers: Annotated[Path | None, typer.Option(help="In place of a model: file of finished answers, .json, .jsonl, .csv.")] = None
    name: Annotated[str | None, typer.Option(help="The model's name in tables. Default: its folder, its file or --model-name.")] = None
    seed: Annotated[int | None, seed_option("The model's seed of training: `mof eval report` joins the seeds of a name.")] = None
    cache: Annotated[Path | None, typer.Option(help="File that keeps answers. Default: cache.jsonl in the folder --output.")] = None
    batch_size: Annotated[int, typer.Option(min=1, help="With --model: prompts at a time.")] = 8
    dtype: Annotated[DtypeName, typer.Option(help="With --model: precision. In 16 bits, the batch size may change answers.")] = "float32"
    trust_remote_code: TrustRemoteCode = False
    decoding: DecodingName = None
    concurrency: Annotated[int, typer.Option(min=1, help="With --endpoint: prompts at a time.")] = 8
    timeout: Annotated[float, typer.Option(help="With --endpoint: seconds for one attempt.")] = 120.0
    attempts: Annotated[int, typer.Option(min=1, help="With --endpoint: attempts at each prompt.")] = 6
    key_variable: Annotated[
        str | None,
        typer.Option(help="Environment variable with the endpoint's API key. Default: OPENAI_API_KEY for OpenAI's host, else no key."),
    ] = None

    def run(self, max_new_tokens: int, actors: ClusterOptions) -> Run:
        """Return the run with its answerer. ValueError unless exactly one answerer is named."""
        from mof.evals.answerers import AnswersFile, LocalModel  # slow
        from mof.evals.answerers.cluster_model import ClusterModel
        from mof.evals.run import Run

        given = [name for name in ("model", "endpoint", "answers") if getattr(self, name) is not None]
        if len(given) != 1 or (self.endpoint is None) != (self.model_name is None):
            raise ValueError("give one of --model FOLDER, --endpoint URL with --model-name NAME, and --answers FILE")
        if self.decoding is not None and self.model is None:
            raise ValueError("--decoding is for --model: finished answers and endpoints are decoded elsewhere")
        cluster = actors.cluster()
        if cluster is not None and self.model is None:
            raise ValueError("--ray is for --model: finished answers and endpoints run elsewhere")
        answerer: Answerer
        if self.answers is not None:
            answerer = AnswersFile(self.answers)
        elif self.endpoint is not None and self.model_name is not None:
            answerer = self.endpoint_of(self.endpoint, self.model_name, max_new_tokens, self.key_variable)
        else:
            assert self.model is not None
            options: dict[str, Any] = {
                "batch_size": self.batch_size,
                "max_new_tokens": max_new_tokens,
                "decoding": load_decoding(self.decoding),
            }
            options |= {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
            model = LocalModel.load(self.model, device=None if cluster is None else "cpu", **options)
            answerer = model if cluster is None else ClusterModel(model, cluster)
        return Run(self.output, answerer, self.cache, progress=True, name=self.name, seed=self.seed)

    def endpoint_of(self, url: str, model: str, max_new_tokens: int, key_variable: str | None) -> Endpoint:
        """Return an endpoint that is asked as these options say."""
        from mof.evals.answerers import Endpoint  # optional

        return Endpoint(
            url, model, key_variable=key_variable, max_new_tokens=max_new_tokens,
            concurrency=self.concurrency, timeout=self.timeout, attempts=self.attempts,
        )  # fmt: skip
