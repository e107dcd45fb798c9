"""An evaluation goes from questions to a folder with `settings.json`, `cache.jsonl`, `answers.jsonl` and `result.json`.

An interrupted run goes on where it stopped, and a second run asks nothing, since answers are kept in the cache. A folder that
holds the answers of another evaluation is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.digests import file_digest
from encoders.images.opening import ImageError
from encoders.runs import RunFile, RunLock, versions
from encoders.storage import fetched, located
from encoders.whole_files import write_sealed, write_sealed_lines
from mof.evals.answerers import AnswersFile
from mof.evals.answering import Answer, AnswerCache, Answerer, Prompt, Usage, answer_all, image_hash
from mof.evals.benchmark import Row

Score = Callable[[list[Answer]], tuple[list[Row], Row, list[str]]]
FORMAT = 1  # version of everything in the folder of an evaluation


@contextmanager
def claimed_folder(folder: Path, **identity: Any) -> Iterator[None]:
    """Give the folder to a single evaluation in a single process: its identity and the versions of packages are in settings.json.

    Versions are no part of the identity: an evaluation that takes days may go on after an update.

    Raises:
        ValueError: if another process fills the folder, or if it holds answers or results of another evaluation (saying what differs).
    """
    remedy = (
        "give a new --output (with a copy of cache.jsonl in it, no answer is asked again); `mof eval report` reads finished results "
        "of older releases, too"
    )
    folder = fetched(folder)
    settings = RunFile(folder / "settings.json", "run of mof eval", FORMAT, remedy, own=["cache.jsonl*"])
    settings.refuse_foreign()
    with RunLock(folder):
        begun = any((folder / name).exists() for name in ("cache.jsonl", "answers.jsonl", "result.json"))
        content = settings.claim(identity, begun=begun)
        settings.write(content["identity"], versions=versions("mof-vig", "torch", "transformers"))
        yield


def row_name(model: str, decoding: str | None) -> str:
    """Return the name of a run's row in tables: the model, with its decoding unless that is plain."""
    return model if decoding in (None, "greedy") else f"{model} ({decoding})"


@dataclass(frozen=True)
class Run:
    """A run has a folder, or the folder's URL (`encoders.storage`), and an answerer of its questions."""

    folder: Path
    answerer: Answerer
    cache: Path | None = None
    """Another place for the cache, so that several runs share it."""
    progress: bool = False
    name: str | None = None
    """The model's name in tables; by default the answerer's name."""
    seed: int | None = None
    """The seed with which the model was trained: a report joins runs of one name and several seeds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", located(self.folder))

    def measure(
        self, benchmark: str, prompts: Sequence[Prompt], data: Any, score: Score, *, decoding: str, refused: str, **settings: Any
    ) -> Row:
        """Ask the prompts of a benchmark, and write answers.jsonl and result.json. Return the result.

        Args:
            data: the questions and right answers, JSON-able: the folder belongs to them, to the images and to the settings.
            score: returns the rows of answers.jsonl, the figures of result.json, and deviations from the official protocol.
            decoding: the official decoding, as a report tells it.
            refused: the consequence of a refused prompt, as a report tells it.

        Raises:
            ValueError: for missing images, for the folder of another evaluation, or while another process fills it.
        """
        digest = _digest(data, {str(image) for prompt in prompts for image in prompt.images})
        with claimed_folder(self.folder, benchmark=benchmark, answerer=self.answerer.settings, data=digest, **settings):
            answers, usage = self.ask(prompts)
            rows, figures, deviations = score(answers)
            own = self.answerer.settings.get("decoding")  # None for answerers that do not tell
            result = {
                "format": FORMAT, "benchmark": benchmark, "model": row_name(self.name or self.answerer.name, own), "seed": self.seed,
                "decoding": own, **figures,
                "deviations": [_decoding(self.answerer, decoding), *_refusals(prompts, answers, refused), *_thoughts(answers), *deviations],
                "usage": dataclasses.asdict(usage),
            }  # fmt: skip
            write_sealed_lines(self.folder / "answers.jsonl", rows)
            write_result(self.folder, result)
            return result

    def ask(self, prompts: Sequence[Prompt], answerer: Answerer | None = None) -> tuple[list[Answer], Usage]:
        asked = answerer or self.answerer
        cache = None if isinstance(asked, AnswersFile) else AnswerCache(self.cache or self.folder / "cache.jsonl")
        return answer_all(asked, prompts, cache, progress=self.progress)


def write_result(folder: Path, result: Row) -> None:
    """Write result.json, with the digests of the files of answers, which are written before."""
    files = [*folder.glob("answers.jsonl"), *folder.glob("answers/*.jsonl")]
    write_sealed(folder / "result.json", result | {"files": {str(file.relative_to(folder)): file_digest(file) for file in files}})


def _digest(data: Any, images: Iterable[str]) -> str:
    """Return a digest of JSON-able data and of the content of images. ValueError for missing images."""
    files = sorted(images)
    if missing := [file for file in files if not Path(file).is_file()]:
        raise ValueError(f"{len(missing)} images are missing, such as {missing[0]}")
    return hashlib.sha256(json.dumps([data, *map(_content, files)], sort_keys=True).encode()).hexdigest()[:32]


def _content(file: str) -> str:
    """Return the digest of an image file, or the reason why it is not read, which costs its own prompts only."""
    try:
        return image_hash(file)
    except ImageError as error:
        return str(error)


def _refusals(prompts: Sequence[Prompt], answers: Sequence[Answer], consequence: str) -> list[str]:
    refused = [f"{prompt.id} ({answer.error[:200]})" for prompt, answer in zip(prompts, answers, strict=True) if answer.error is not None]
    return [f"{len(refused)} prompts were refused, such as {refused[0]}: {consequence}"] if refused else []


def _thoughts(answers: Sequence[Answer]) -> list[str]:
    count = sum(answer.final != answer.text for answer in answers)
    return [f"{count} answers hold thoughts beside the answer, which are left out"] if count else []


def _decoding(answerer: Answerer, official: str) -> str:
    if isinstance(answerer, AnswersFile):
        return "finished answers: how they were made is not known"
    return f"{decoding_note(answerer.settings.get('decoding', 'greedy'))}; {official}"


def decoding_note(decoding: str) -> str:
    """Return the words of a report for the decoding in an answerer's settings."""
    return "greedy decoding" if decoding == "greedy" else f"decoding {decoding}, greedily"
